"""Libraries that are built and loaded at first use.

A library is kept in a folder named by a hash of its sources, its flags and the torch version: a change builds anew,
anything else is found in milliseconds. A library that another user may have written (``trust``), or that differs by a
bit from what was built (``kernel_cache``), is not loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from int8compile.config import cpu_isa
from int8compile.errors import KernelBuildError
from int8compile.native import tuned, wgmma
from int8compile.native.libraries import Provided, Useless, inspect, provide
from int8compile.native.notices import warn_once

_loading = threading.Lock()
_loaded: set[str] = set()
# Libraries that do not load even when newly built, and why: not to be built again for every graph.
_hopeless: dict[str, str] = {}


def load(name: str, *, build: bool = True) -> None:
    """Load one of ``LIBRARIES``, which registers its operators, and build it first if need be.

    Args:
        build: whether it may be built; otherwise it has to be there.

    Raises:
        KernelBuildError: a missing tool, by name, the compiler's own message, or the reason why it does not load.
    """
    with _loading:
        if name in _hopeless:
            raise KernelBuildError(_hopeless[name])
        if name not in _loaded:
            _load(name, build)


def _load(name: str, build: bool) -> None:
    import int8compile.ops  # noqa: F401 (their schemas come first)

    library = _load_library(name) if build else _load_at_hand(name)
    _loaded.add(name)
    if name == "cpu":
        torch.ops.int8compile_native.set_isa(cpu_isa())
        _warn_of_rejected()
        tuned.apply_to_kernels()
    if name == "cuda":
        _enable_wgmma(library)


def _load_library(name: str) -> Path:
    """Load a library; one that is whole and does not load, as after a move to another system, is built anew once."""
    provided = provide(name)
    problem = _not_loaded(provided.path)
    if problem is not None and not provided.fresh:
        provided = provide(name, useless=Useless(provided.version, f"{provided.path} does not load ({problem})"))
        problem = _not_loaded(provided.path)
    if problem is not None:
        _hopeless[name] = f"the {name} kernels do not load, although they have just been built: {problem}"
        raise KernelBuildError(_hopeless[name])
    _tell(provided)
    return provided.path


def _load_at_hand(name: str) -> Path:
    place, state = inspect(name)
    problem = _not_loaded(place.binary) if state.ready else state.problem or "they are not built yet"
    if problem is not None:
        raise KernelBuildError(f"the {name} kernels do not load: {problem}")
    return place.binary


def _not_loaded(library: Path) -> str | None:
    """Load a library; why it does not."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return str(error.__cause__ or error)  # torch says which library, the system why
    return None


def build(name: str, *, keep: bool = False) -> Path:
    """The shared library's path, built if it is not there yet.

    Args:
        keep: other processes are to find it, so a temporary folder will not do.

    Raises:
        KernelBuildError: a missing tool, by name, or the compiler's own message; or there is no folder for it.
    """
    provided = provide(name, keep=keep)
    _tell(provided)
    return provided.path


def _tell(provided: Provided) -> None:
    if provided.note is not None:
        warn_once(f"int8: {provided.note}")


def binary_path(name: str) -> Path:
    """Where the shared library is, or will be once built: its folder's name is a hash of all that goes into it."""
    place, _ = inspect(name)
    return place.binary


def _warn_of_rejected() -> None:
    """Kernels that this CPU could run but that fail their self-check are left out, at a cost in speed."""
    rejected = torch.ops.int8compile_native.rejected()
    if rejected:
        chosen = torch.ops.int8compile_native.isa()
        warn_once(
            f"int8: the CPU kernels for {', '.join(rejected.split())} compute wrong numbers on this machine and are "
            f"not used; {chosen} ones are, which are slower. Please report it, with the output of `int8compile doctor`."
        )


def _enable_wgmma(library: Path) -> None:
    """Let the dispatch table choose Hopper's wgmma kernels where they have been proven."""
    device = wgmma.hopper()
    if device is None:
        return
    problem = wgmma.problem(library, device)
    if problem is None:
        torch.ops.int8compile_native.enable_wgmma(True)
    else:
        warn_once(f"int8: the wgmma kernels are not used: {problem}")


def stamps(weights: list[torch.Tensor]) -> Any:
    """What these weights look like, with a ``match(weights)`` that tells whether they still do; None without C++."""
    if "common" not in _loaded:
        return None
    return torch.classes.int8compile_native.Stamps(weights)


def release_storage() -> Callable[[torch.Tensor], None]:
    """A function that frees a tensor's storage such that touching it later raises an error that says so.

    Resizing the storage alone would not do: eager operators that read it crash the process.

    Raises:
        KernelBuildError: the C++ behind it cannot be built.
    """
    load("common")
    op = torch.ops.int8compile_native.release_storage.default

    def release(tensor: torch.Tensor) -> None:
        op(tensor, _RELEASED)

    return release


_RELEASED = (
    "int8compile: this float weight was freed by release_weights=True; only compiled code can run it now. "
    "int8compile.restore_weights_(model) brings back its int8 values as floats; reload the model for the originals."
)
