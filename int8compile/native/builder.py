"""The sources and flags of each native library, and compiling one.

``torch.utils.cpp_extension`` and ninja do the work. The result depends on the sources, the flags, torch and the kind of
machine; ``key`` is a hash of all of them. ``kernel_cache.py`` decides where the result is kept.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import torch

from int8compile.errors import KernelBuildError
from int8compile.native.nvidia import architectures, nvcc, nvcc_flags


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

# What is not used need not be there where the library is: a C++ program that takes it has less of torch than Python.
_LINK_FLAGS = ["-shared", *(["-Wl,--as-needed"] if sys.platform == "linux" else [])]


# Torch's builder takes its tools from the environment, which all threads share.
_building = threading.Lock()


def library_of(name: str) -> Library:
    """A library as it is compiled here, which for ``cuda`` means: for the GPUs at hand.

    Raises:
        KernelBuildError: there is no GPU that it could be compiled for.
    """
    library = LIBRARIES[name]
    return library._replace(nvcc_flags=library.nvcc_flags + nvcc_flags(architectures())) if name == "cuda" else library


def key(name: str) -> str:
    """The library's name and a hash of all that goes into it."""
    library = library_of(name)
    digest = hashlib.sha256(repr((library, _LINK_FLAGS, torch.__version__, platform.machine())).encode())
    for path in _files(library):
        digest.update(f"{path.parent.name}/{path.name}\0".encode() + path.read_bytes())
    return f"{name}-{digest.hexdigest()[:16]}"


def _files(library: Library) -> list[Path]:
    csrc = Path(str(resources.files("int8compile.csrc")))
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    return [path for folder in library.folders for path in sorted((csrc / folder).iterdir()) if path.suffix in suffixes]


def compile_library(name: str, folder: Path) -> Path:
    """Compile a library in an empty folder, and load nothing.

    Raises:
        KernelBuildError: a missing tool, by name, or the compiler's own message.
        OSError: there is no space left.
    """
    # A program to torch, since it would load a library on the spot: unchecked, and even if it cannot be kept.
    from torch.utils.cpp_extension import load as compile_program

    library = library_of(name)
    _check_tools(name, library)
    print(f"int8compile: compiling the {name} library (once, up to a minute or two) ...", file=sys.stderr, flush=True)
    try:
        with _building, _tools_in_environment(folder):
            built = compile_program(
                f"int8compile_{name}",
                [str(path) for path in _files(library) if path.suffix in (".cpp", ".cu")],
                extra_cflags=list(library.flags),
                extra_ldflags=list(_LINK_FLAGS),
                extra_cuda_cflags=list(library.nvcc_flags),
                build_directory=str(folder),
                is_python_module=False,
                is_standalone=True,
            )
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        _raise_if_full(folder, error)
        compiler = "nvcc" if name == "cuda" else cxx()[0]
        raise KernelBuildError(f"the {name} kernels do not compile with {compiler}\n{error}") from error
    return Path(built)


def _check_tools(name: str, library: Library) -> None:
    compiler, found = cxx()
    if found is None:
        raise KernelBuildError(
            f"the {name} kernels cannot be built: no C++ compiler ({compiler}) was found\n"
            "Install g++ or clang++, or set CXX to one."
        )
    if ninja() is None:
        raise KernelBuildError(f"the {name} kernels cannot be built: ninja was not found (pip install ninja)")
    if library.nvcc_flags and nvcc() is None:
        raise KernelBuildError(
            f"the {name} kernels cannot be built: nvcc was not found (install the CUDA toolkit, or set CUDA_HOME)"
        )


def _raise_if_full(folder: Path, error: Exception) -> None:
    """A full disk is no fault of the compiler's: another folder may do."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if getattr(error, "errno", None) == code or os.strerror(code) in str(error):
            raise OSError(code, os.strerror(code), str(folder)) from error


def cxx() -> tuple[str, str | None]:
    """The C++ compiler that builds use, ``$CXX`` or ``c++``, and where it was found."""
    compiler = _compiler_command()[0]
    return compiler, shutil.which(compiler)


def _compiler_command() -> list[str]:
    """``$CXX`` as a shell would split it; ``c++`` where it is unset or holds nothing."""
    asked = os.path.expandvars(os.environ.get("CXX", "")).strip()
    if shutil.which(asked):  # a path with spaces
        return [asked]
    try:
        return [word for word in shlex.split(asked) if word] or ["c++"]
    except ValueError:  # a quotation without an end
        return [asked]


def ninja() -> str | None:
    """Where ninja was found."""
    return shutil.which("ninja", path=_path_with_ninja())


def _path_with_ninja() -> str:
    """pip's ninja lies beside python, which is on PATH only in an activated environment."""
    path = os.environ.get("PATH", os.defpath)
    try:
        from ninja import BIN_DIR
    except ImportError:
        return path
    return os.pathsep.join([BIN_DIR, path])


@contextlib.contextmanager
def _tools_in_environment(folder: Path) -> Iterator[None]:
    """The compiler and ninja where torch's builder looks for them, for as long as it runs.

    Some versions of torch give ``$CXX`` to a shell as it is and others as one quoted word, and none takes an empty one.
    A name of letters and digits is the same to all of them, so anything else becomes a script with such a name.
    """
    changed: dict[str, str | None] = {"PATH": _path_with_ninja(), "TMPDIR": str(folder)}
    with contextlib.suppress(OSError):
        changed["TMPDIR"] = tempfile.gettempdir()  # which can be written to; compilers take what is set, and fail
    if not os.environ.get("CC", "c").strip():
        changed["CC"] = None  # nvcc would be given the empty name
    command = _compiler_command()
    if len(command) == 1 and re.fullmatch(r"[\w@%+=:,./-]+", command[0]):
        changed["CXX"] = command[0]
    else:
        tools = folder / "tools"
        tools.mkdir()
        script = tools / "int8compile-c++"
        script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        script.chmod(0o700)
        changed["PATH"] = os.pathsep.join([str(tools), _path_with_ninja()])
        changed["CXX"] = script.name
        changed["TORCH_NO_COMPILER_WRAPPER"] = "1"  # it puts ccache first, which may be there already
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
