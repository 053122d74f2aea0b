"""Native code: which provider computes the int8 products, and building what csrc/ holds at first use.

A library is compiled by ``torch.utils.cpp_extension`` with ninja into a folder named by a hash of its sources, its
flags and the torch version: a change builds anew, everything else is found ready in milliseconds. Processes that start
together wait for one build, and one that is killed leaves nothing that another could take for a library: a build goes
on in a folder of its own, under a lock that the system releases with its process, and is moved into place when whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch

from int8compile.config import cache_folder, cpu_isa
from int8compile.errors import KernelBuildError
from int8compile.nvidia import architectures, gpus_are_served, nvcc, nvcc_flags

log = logging.getLogger(__name__)


class Library(NamedTuple):
    """A shared library of operators: the folders of ``csrc`` that hold its sources, and how they are compiled."""

    folders: tuple[str, ...]
    flags: tuple[str, ...]
    nvcc_flags: tuple[str, ...] = ()


LIBRARIES = {
    # The reference rounds after every multiplication, so a fused multiply-add would give other bits.
    "cpu": Library(("ops", "cpu"), ("-O3", "-fopenmp", "-ffp-contract=off")),
    "common": Library(("common",), ("-O2",)),
    # ... which the CUDA kernels see to themselves, operation by operation. For which GPUs: library_of().
    "cuda": Library(("ops", "cuda"), ("-O2", "-DINT8COMPILE_CUDA"), ("-O3",)),
}


# torch's build links libtorch_python, which nothing here uses and a C++ program that takes the library does not have.
_LINK_FLAGS = ["-Wl,--as-needed"] if sys.platform == "linux" else []


def wanted() -> list[str]:
    """The names of the libraries that serve this machine: ``cuda`` only with GPUs for it, or where it is asked for."""
    return [name for name in LIBRARIES if name != "cuda" or gpus_are_served()]


class Provider(NamedTuple):
    """Who computes the int8 products: ``native avx2 (cpu)``, ``reference (cuda)``."""

    name: str
    native: bool


def choose_provider(kernels: str, example_inputs: Sequence[Any]) -> Provider:
    """The provider for tensors such as these, for ``kernels`` = auto, native or reference.

    Raises:
        KernelBuildError: ``"native"``, and there are no native kernels for the device or they cannot be built.
    """
    devices = sorted({t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}) or ["cpu"]
    reference = Provider(f"reference ({', '.join(devices)})", native=False)
    if kernels == "reference":
        return reference
    if not {"cpu", "cuda"}.issuperset(devices):
        if kernels == "native":
            raise KernelBuildError(
                f"kernels='native': this version has no native kernels for {', '.join(devices)}; use kernels='auto'"
            )
        return reference
    # CPU tensors beside a GPU's are sizes and positions, not activations.
    device = "cuda" if "cuda" in devices else "cpu"
    try:
        load(device)
        load("common")
    except KernelBuildError as error:
        if kernels == "native":
            raise
        _warn_once(f"int8: {error.args[0].splitlines()[0]}; the slower reference operators are used instead")
        return reference
    return Provider(f"native {_kernel_set(device)} ({device})", native=True)


def _kernel_set(device: str) -> str:
    """``avx2``; ``sm_90a``."""
    if device == "cuda":
        return ", ".join(f"sm_{name}" for name in architectures())
    return str(torch.ops.int8compile_native.isa())


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


_loading = threading.Lock()
_loaded: set[str] = set()


def load(name: str) -> None:
    """Build (if need be) and load one of ``LIBRARIES``, which registers its operators.

    Raises:
        KernelBuildError: a missing tool, by name, or the compiler's own message.
    """
    with _loading:
        _load(name)


@functools.cache
def _load(name: str) -> None:
    import int8compile.ops  # noqa: F401 (their schemas come first)

    library = build(name)
    torch.ops.load_library(str(library))
    _loaded.add(name)
    if name == "cpu":
        torch.ops.int8compile_native.set_isa(cpu_isa())
        _warn_of_rejected()
    if name == "cuda":
        _enable_wgmma(library)


def _warn_of_rejected() -> None:
    """Kernels that this CPU could run but that fail their self-check are left out, at a cost in speed."""
    rejected = torch.ops.int8compile_native.rejected()
    if rejected:
        chosen = torch.ops.int8compile_native.isa()
        _warn_once(
            f"int8: the CPU kernels for {', '.join(rejected.split())} compute wrong numbers on this machine and are "
            f"not used; {chosen} ones are, which are slower. Please report it, with the output of `int8compile doctor`."
        )


def build(name: str) -> Path:
    """The shared library's path, built if it is not there yet.

    Raises:
        KernelBuildError: a missing tool, by name, or the compiler's own message.
    """
    target = library_path(name)
    if target.exists():
        return target
    cache = cache_folder()
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(cache / f"{target.parent.name}.lock"):
        if not target.exists():  # another process may have built it while this one waited
            library = library_of(name)
            sources = [path for path in _files(library) if path.suffix in (".cpp", ".cu")]
            _compile(name, library, sources, target)
    return target


def library_path(name: str) -> Path:
    """Where the shared library is, or will be once built: its folder's name is a hash of all that goes into it."""
    library = library_of(name)
    return cache_folder() / f"{name}-{_digest(library, _files(library))}" / f"int8compile_{name}.so"


def library_of(name: str) -> Library:
    """A library as it is compiled here, which for ``cuda`` means: for the GPUs at hand.

    Raises:
        KernelBuildError: there is no GPU that it could be compiled for.
    """
    library = LIBRARIES[name]
    return library._replace(nvcc_flags=library.nvcc_flags + nvcc_flags(architectures())) if name == "cuda" else library


def _files(library: Library) -> list[Path]:
    csrc = Path(str(resources.files("int8compile.csrc")))
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    return [path for folder in library.folders for path in sorted((csrc / folder).iterdir()) if path.suffix in suffixes]


def _digest(library: Library, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(repr((library, torch.__version__, platform.machine())).encode())
    for path in files:
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a file lock; the system lets go of it when the process ends, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(name: str, library: Library, sources: Sequence[Path], target: Path) -> None:
    from torch.utils.cpp_extension import load as compile_and_load

    import int8compile.ops  # noqa: F401 (what is compiled is loaded too, and their schemas come first)

    if library.nvcc_flags and nvcc() is None:
        raise KernelBuildError(
            f"the {name} kernels cannot be built: nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)"
        )
    for left_over in target.parent.parent.glob(f"building-{target.parent.name}-*"):
        shutil.rmtree(left_over, ignore_errors=True)  # of a process that was killed; we hold its lock
    print(f"int8compile: compiling the {name} library (once, up to a minute or two) ...", file=sys.stderr, flush=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"building-{target.parent.name}-", dir=target.parent.parent))
    try:
        with _ninja_on_path():
            compile_and_load(
                f"int8compile_{name}",
                [str(path) for path in sources],
                extra_cflags=list(library.flags),
                extra_ldflags=_LINK_FLAGS,
                extra_cuda_cflags=list(library.nvcc_flags),
                build_directory=str(scratch),
                is_python_module=False,
            )
        target.parent.mkdir(mode=0o700, exist_ok=True)
        (scratch / target.name).rename(target)
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        raise KernelBuildError(_explain(name, error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _explain(name: str, error: Exception) -> str:
    """The first line names what is missing, if it is a tool; the compiler's own lines follow."""
    compiler, found = cxx()
    if found is None:
        return f"the {name} kernels cannot be built: no C++ compiler ({compiler}) was found\n{error}"
    if "ninja" in str(error).lower() and "Error building" not in str(error):
        return f"the {name} kernels cannot be built: ninja was not found (pip install ninja)\n{error}"
    return f"the {name} kernels do not compile with {'nvcc' if name == 'cuda' else compiler}\n{error}"


def cxx() -> tuple[str, str | None]:
    """The C++ compiler that builds use, ``$CXX`` or ``c++``, and where it was found."""
    compiler = os.path.expandvars(os.environ.get("CXX", "c++")).split()[0]
    return compiler, shutil.which(compiler)


def ninja() -> str | None:
    """Where ninja was found."""
    with _ninja_on_path():
        return shutil.which("ninja")


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    """pip's ninja lies beside python, which is on PATH only in an activated environment."""
    before = os.environ.get("PATH", "")
    with contextlib.suppress(ImportError):
        from ninja import BIN_DIR

        os.environ["PATH"] = os.pathsep.join([BIN_DIR, before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _enable_wgmma(library: Path) -> None:
    """Let the dispatch table choose Hopper's wgmma kernels where they have been proven, once a GPU model and build.

    The proof runs in a process of its own, since kernels that fail could hang or take the process's CUDA context with
    them; what comes of it is kept beside the library. That it failed stands there before it begins: where a process
    was killed because the proof hung, the next one need not hang too.
    """
    hopper = [i for i in range(torch.cuda.device_count()) if torch.cuda.get_device_capability(i) == (9, 0)]
    if not hopper:
        return
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(hopper[0]))
    verdict = library.parent / f"wgmma-{name}"
    with _locked(verdict.with_suffix(".lock")):
        if not verdict.exists():
            verdict.write_text("their proof did not end")
            try:
                verdict.write_text(_failed_proof(library, hopper[0]))
            except BaseException:  # Ctrl-C says nothing about the kernels
                verdict.unlink()
                raise
        problem = verdict.read_text()
    if problem:
        _warn_once(f"int8: the wgmma kernels are not used: {problem} (delete {verdict} to try again)")
    else:
        torch.ops.int8compile_native.enable_wgmma(True)


def _failed_proof(library: Path, device: int) -> str:
    """Why wgmma cannot be used; empty if it can."""
    command = [sys.executable, "-m", "int8compile.proof", str(library), str(device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"their proof did not end: {type(error).__name__}"
    if done.returncode == 0:
        return ""
    lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
    return f"their proof failed: {lines[-1]}"


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
