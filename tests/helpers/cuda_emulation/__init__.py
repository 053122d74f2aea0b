"""The CUDA kernels, run on a CPU: csrc/cuda compiled by g++ against emulation.h, with AddressSanitizer.

``Emulator`` loads them as operators ``int8compile_emulated::*`` for CPU tensors, in a process of its own: the sanitizer
has to be there from a process's start, and a mistake that it finds ends the process.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import TORCH_LIB_PATH, include_paths

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "csrc" / "cuda"
SHARED = SOURCES.parent / "ops"
CACHE = Path(tempfile.gettempdir()) / f"int8compile-cuda-emulation-{os.getuid()}"
#: compiled without the sanitizer and unoptimised: host code full of torch headers, which is slow to compile
HOST_ONLY = ("gradient.cpp", "ops.cpp", "schemas.cpp")
LEFT_OUT = ("hopper.cuh", "wgmma.cu", "gpu.cpp")  # emulation.cpp stands in for them
LEFT_OUT += ("autograd.cpp",)  # is the same for CPU tensors

Mutation = Mapping[str, tuple[str, str]]


class EmulationError(Exception):
    """The emulation or a sanitizer ended the process; carries its last words."""


def build(mutation: Mutation | None = None) -> Path:
    """The shared library, compiled if need be. ``mutation``: file -> (text, what stands there instead)."""
    root = Path(tempfile.mkdtemp(prefix="int8compile-cuda-"))
    folder = root / SOURCES.name
    try:
        for sources in (SOURCES, SHARED):
            shutil.copytree(sources, root / sources.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for name, (old, new) in (mutation or {}).items():
            text = (folder / name).read_text()
            assert text.count(old) == 1, f"{name} has {text.count(old)} times: {old}"
            (folder / name).write_text(text.replace(old, new))
        for path in HERE.glob("emulation.*"):
            shutil.copy(path, folder)
        CACHE.mkdir(mode=0o700, exist_ok=True)
        headers = _digest(sorted([*root.glob("*/*.h"), *folder.glob("*.cuh")]))
        plain = _digest(sorted(root.glob("*/*.h")))
        sources = sorted([*folder.glob("*.cu"), *root.glob("*/*.cpp")])
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: _compile(s, plain if s.name in HOST_ONLY else headers), sources))
        library = CACHE / f"{hashlib.sha256(repr(objects).encode()).hexdigest()[:16]}.so"
        if not library.exists():
            torch_libraries = [f"-L{TORCH_LIB_PATH}", "-ltorch_cpu", "-lc10"]
            flags = ["-shared", "-fsanitize=address,alignment", "-o", f"{library}.new"]
            _run(["g++", *flags, *map(str, objects), *torch_libraries])
            os.replace(str(library) + ".new", library)
        return library
    finally:
        shutil.rmtree(root)


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _compile(source: Path, headers: str) -> Path:
    sanitize = ["-O0"] if source.name in HOST_ONLY else ["-O1", "-g1", "-fsanitize=address,alignment"]
    flags = ["-std=c++20", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-DINT8COMPILE_EMULATED", *sanitize]
    flags += ["-fno-sanitize-recover=alignment", "-Wno-unknown-pragmas", "-Wno-subobject-linkage"]
    key = hashlib.sha256(f"{headers} {flags} {source.name}".encode() + source.read_bytes()).hexdigest()[:16]
    target = CACHE / f"{source.stem}-{key}.o"
    if not target.exists():
        new = f"{target}.{os.getpid()}"
        include = [f"-I{source.parent}", *(f"-I{path}" for path in include_paths())]
        _run(["g++", *flags, *include, "-x", "c++", "-c", str(source), "-o", new])
        os.replace(new, target)
    return target


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Emulator:
    """The operators of one build, in a process that is started again after it was ended."""

    def __init__(self, library: Path) -> None:
        self.binary = library
        self.process: subprocess.Popen[bytes] | None = None

    def call(self, op: str, *args: Any, **settings: Any) -> Any:
        """``torch.ops.int8compile_emulated.<op>(*args)``.

        Args:
            settings: ``seed`` of the schedule; ``skip_barrier``, ``skip_wait``: ordinal of a barrier or of a wait for
                copies that every thread leaves out; ``multiprocessors`` of the GPU that is pretended.

        Raises:
            EmulationError: the process ended; what it said.
        """
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((op, args, settings), self.process.stdin)
            self.process.stdin.flush()
            status, result = pickle.load(self.process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            self.process.wait()
            self.errors.seek(0)
            raise EmulationError(self.errors.read().decode(errors="replace")[:6000]) from None
        if status == "error":
            raise result
        return result

    def counts(self) -> tuple[int, int]:
        """Barriers and waits for copies of a thread in the last call."""
        result: tuple[int, int] = self.call("counts")
        return result

    def _start(self) -> None:
        # libstdc++ beside it, which python does not load by itself: the sanitizer looks for __cxa_throw at start.
        names = ("libasan.so", "libstdc++.so")
        libraries = ":".join(_run(["g++", f"-print-file-name={name}"]).strip() for name in names)
        options = "detect_leaks=0:detect_odr_violation=0:detect_stack_use_after_return=0:abort_on_error=0"
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(self.binary)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "LD_PRELOAD": libraries, "ASAN_OPTIONS": options},
        )

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
