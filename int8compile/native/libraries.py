"""Finds a library in the cache folder, or builds it and keeps it there.

A library is used if it is complete and no other user can have written it; otherwise it is built anew, once, in the same
place. Where the cache folder cannot be used at all, the library is built in a temporary folder of this process. A cache
folder that can only be read is enough if the library is in it. The caller gets a note for the user, to be shown once.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from int8compile.config import cache_folder
from int8compile.errors import KernelBuildError
from int8compile.native import kernel_cache
from int8compile.native.builder import compile_library, key
from int8compile.native.kernel_cache import CacheError, Place, State


class Useless(NamedTuple):
    """A library that is whole, and yet of no use: which version of it, and why."""

    version: object
    why: str


class Provided(NamedTuple):
    """A library at hand: whether this call built it, in which version it is, and what the user ought to know."""

    path: Path
    fresh: bool
    version: object
    note: str | None = None


def provide(name: str, *, keep: bool = False, useless: Useless | None = None) -> Provided:
    """The library, built if it is not there yet.

    Args:
        keep: other processes are to find it, so a temporary folder will not do.
        useless: not to be found again, but replaced.

    Raises:
        KernelBuildError: a missing tool, by name, or the compiler's own message; or there is no folder for it.
    """
    try:
        return _provide_in(_place(kernel_cache.user_folder(make=True), name), name, useless)
    except CacheError as error:
        problem = error
    if keep:
        raise KernelBuildError(f"the {name} kernels cannot be kept: {problem}")
    try:
        provided = _provide_in(_place(kernel_cache.temporary_folder(), name), name, useless)
    except CacheError as error:
        raise KernelBuildError(f"the {name} kernels cannot be built: {problem}; {error}") from error
    return provided._replace(note=f"{problem}; kernels are built in a temporary folder, for this process alone")


def _provide_in(place: Place, name: str, useless: Useless | None) -> Provided:
    """Raises CacheError where nothing can be built in the place's folder, which says nothing of other folders."""
    state = _state(place, useless)
    if state.ready:
        return Provided(place.binary, False, kernel_cache.version(place))
    try:
        with kernel_cache.locked(place.folder / f"{place.key}.lock") as alone:
            state = _state(place, useless)  # another process may have built it while this one waited
            if state.ready:
                return Provided(place.binary, False, kernel_cache.version(place))
            with kernel_cache.scratch(place, alone=alone) as folder:
                kernel_cache.keep(place, compile_library(name, folder))
    except KernelBuildError as error:
        raise _with_reason(error, state.problem) from error
    except OSError as error:
        problem = kernel_cache.unusable(error, place.folder)
        raise CacheError(f"{state.problem}; {problem}" if state.problem else str(problem)) from error
    note = None if state.problem is None else f"{state.problem}; it has been built anew"
    return Provided(place.binary, True, kernel_cache.version(place), note)


def _state(place: Place, useless: Useless | None) -> State:
    found = kernel_cache.state(place)
    if found.ready and useless is not None and kernel_cache.version(place) == useless.version:
        return State(ready=False, problem=useless.why)
    return found


def _with_reason(error: KernelBuildError, problem: str | None) -> KernelBuildError:
    """With a word in its first line on why what was there would not do."""
    first, *lines = str(error).splitlines()
    return KernelBuildError("\n".join([f"{first} ({problem})" if problem else first, *lines]))


def _place(folder: Path, name: str) -> Place:
    return Place(folder, key(name), f"int8compile_{name}.so")


def inspect(name: str) -> tuple[Place, State]:
    """Where a library is, or would be, and in which state it is. Builds nothing, and makes no folder.

    Raises:
        KernelBuildError: it could not be built here for want of a GPU, or there is no home folder to keep it in.
    """
    temporary = kernel_cache.temporary_in_use()
    if temporary is not None and kernel_cache.state(_place(temporary, name)).ready:
        return _place(temporary, name), State(ready=True)
    try:
        place = _place(kernel_cache.user_folder(make=False), name)
    except CacheError as error:
        try:
            return _place(cache_folder(), name), State(ready=False, problem=str(error))
        except OSError:
            raise KernelBuildError(str(error)) from error
    return place, kernel_cache.state(place)
