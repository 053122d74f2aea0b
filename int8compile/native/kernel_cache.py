"""The cache folder of compiled libraries. A library in it is complete, and no other user can write to it.

A library and its checksum (in the form that ``sha256sum -c`` reads) share a folder, whose name has a hash of everything
that went into the library. The folder is prepared next to its final place, synced to the disk and moved by one rename.
A process that is killed leaves a folder ``building-*``, which the next one removes, and never half a library.

A lock keeps processes from building the same library at once, and distinguishes left-overs from running builds. The
system releases it when its process ends, in whatever way. Where locks do not work, everything else still does.

Where the user's cache folder cannot be used, a temporary folder, private to the process, replaces it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import filelock

from int8compile.config import cache_folder
from int8compile.files import reach_disk
from int8compile.native.trust import Untrusted, check_folder, check_own_folder, opened


class CacheError(OSError):
    """A folder that libraries cannot be kept in: which, why, and the way out."""


class Place(NamedTuple):
    """Where one library is, or will be."""

    folder: Path  # of all libraries, by its real path
    key: str  # cpu-0123456789abcdef
    file: str  # int8compile_cpu.so

    @property
    def binary(self) -> Path:
        return self.folder / self.key / self.file

    @property
    def checksum(self) -> Path:
        return self.binary.with_name(f"{self.file}.sha256")


class State(NamedTuple):
    """What is in a place: a whole library; nothing, without a problem; or something that has one."""

    ready: bool
    problem: str | None = None


def user_folder(*, make: bool) -> Path:
    """The real path of the user's cache folder, which may not be there yet unless it is made.

    Raises:
        CacheError: it cannot be made, or another user may have written to it.
    """
    try:
        named = cache_folder()
        folder = Path(os.path.realpath(named))
        # Before anything is made in it.
        check_folder(folder)
        if make:
            _make(folder)
            check_folder(folder)
        if folder.exists():
            _check_programs_run_from(folder)
    except Untrusted as error:
        raise CacheError(f"the cache folder {named} is not used: {error} ({error.way_out})") from error
    except OSError as error:
        raise unusable(error) from error
    return folder


def is_writable(folder: Path) -> bool:
    """Whether something can be made in a folder, or the folder itself if it is not there."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    return there.is_dir() and os.access(there, os.W_OK | os.X_OK)


def unusable(error: OSError, folder: Path | None = None) -> CacheError:
    """That a folder, the user's cache folder if none is named, cannot be used because of an error in it."""
    try:
        named = folder or cache_folder()
    except OSError as no_folder:
        return CacheError(f"{no_folder} (set INT8COMPILE_CACHE_DIR)")
    variable = "TMPDIR" if named == temporary_in_use() else "INT8COMPILE_CACHE_DIR"
    return CacheError(f"the folder {named} cannot be used: {error.strerror or error} (set {variable} to another)")


def _make(folder: Path) -> None:
    """The folder and those above it that are missing, none of which is anybody else's business."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):  # by another process of ours, or what check_folder will say
                path.mkdir(mode=0o700)


def _check_programs_run_from(folder: Path) -> None:
    if hasattr(os, "statvfs") and os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise OSError("it is mounted noexec, so that no library loads from it")


_temporary: dict[int, Path] = {}


def temporary_folder() -> Path:
    """A folder of this process, which is removed when it ends.

    Raises:
        CacheError: there is no place for one.
    """
    process = os.getpid()  # a forked child has one of its own
    if process not in _temporary:
        problems = []
        for find in (tempfile.gettempdir, lambda: "/tmp", lambda: "/var/tmp"):
            try:
                _temporary[process] = _new_temporary(find())
                break
            except OSError as error:
                problems.append(str(error))
        else:
            raise CacheError(f"there is no temporary folder either: {problems[0]} (set TMPDIR)")
        atexit.register(_remove_temporary, process)
    return _temporary[process]


def _new_temporary(parent: str) -> Path:
    folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="int8compile-", dir=parent)))
    try:
        check_folder(folder)
        _check_programs_run_from(folder)
    except OSError:
        folder.rmdir()
        raise
    return folder


def _remove_temporary(process: int) -> None:
    if process == os.getpid():  # not in a child that was forked
        shutil.rmtree(_temporary.pop(process, ""), ignore_errors=True)


def temporary_in_use() -> Path | None:
    """This process's temporary folder, if it has one."""
    return _temporary.get(os.getpid())


def state(place: Place) -> State:
    """Whether the library is there, as it was built, and nobody else's; reads it once."""
    try:
        check_own_folder(place.binary.parent)
        with opened(place.binary) as file:
            actual = _digest(file)
    except FileNotFoundError:
        return State(ready=False)
    except OSError as error:
        return State(ready=False, problem=_describe(place.binary, error))
    try:
        with opened(place.checksum) as file:
            expected = file.read(len(actual))
    except FileNotFoundError:
        return State(ready=False, problem=f"{place.binary} has no checksum beside it")
    except OSError as error:
        return State(ready=False, problem=_describe(place.checksum, error))
    if expected != actual.encode():
        return State(ready=False, problem=f"{place.binary} is damaged (it does not match its checksum)")
    return State(ready=True)


def _describe(path: Path, error: OSError) -> str:
    return str(error) if isinstance(error, Untrusted) else f"{path} cannot be read ({error.strerror})"


def _digest(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def version(place: Place) -> object:
    """Differs between a library and one that has since taken its place; None if there is none."""
    try:
        status = place.binary.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold a file lock, in a folder that is trusted; False where there can be none (read-only, NFS without locks)."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(str(path), mode=0o600))  # nobody else is to hold it
            held = True
        except (OSError, NotImplementedError):
            held = False
        yield held


@contextlib.contextmanager
def scratch(place: Place, *, alone: bool) -> Iterator[Path]:
    """A new folder to build the library in, removed at the end.

    Args:
        alone: nobody else is building the library, so what looks like it was left by a process that was killed.
    """
    prefix = f"building-{place.key}-"
    if alone:
        for left_over in place.folder.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def keep(place: Place, built: Path) -> None:
    """Put a library that was built in a ``scratch`` folder into its place, instead of what is there.

    Raises:
        OSError: it cannot be: the disk is full, or what is there cannot be removed. Then nothing is there, or what was.
    """
    # Others may read what is in a cache folder that they may read, as in a container image: never write.
    mode = 0o700 | (place.folder.stat().st_mode & 0o755)
    entry = built.parent / "entry"
    entry.mkdir()
    ready = place._replace(folder=built.parent, key=entry.name)
    built.rename(ready.binary)
    with ready.binary.open("rb") as file:
        digest = _digest(file)
    ready.checksum.write_text(f"{digest}  {place.file}\n")
    ready.binary.chmod(mode)
    ready.checksum.chmod(mode & 0o644)
    entry.chmod(mode)
    for path in (ready.binary, ready.checksum, entry):
        reach_disk(path)
    _remove(place.binary.parent)
    try:
        entry.rename(place.binary.parent)
    except OSError:
        if not state(place).ready:  # without a lock, another process may have been faster
            raise
    reach_disk(place.folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
