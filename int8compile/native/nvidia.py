"""The GPUs that CUDA kernels are built for, and the nvcc that builds them.

nvcc is always given the architectures: by default torch's builder compiles for plain 9.0, which has no wgmma.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from int8compile.config import cuda_archs
from int8compile.errors import KernelBuildError

#: mma.sync with int8 and bf16, and cp.async
OLDEST = 80


def architectures() -> tuple[str, ...]:
    """Of the GPUs that torch sees, or as ``INT8COMPILE_CUDA_ARCHS`` has them, as nvcc writes them: ``80``, ``90a``.

    Raises:
        KernelBuildError: there is no GPU, one is too old, or the variable cannot be read.
    """
    asked = cuda_archs()
    if asked is not None:
        return tuple(dict.fromkeys(_checked(name) for name in re.split(r"[;,\s]+", asked) if name))
    count = torch.cuda.device_count()
    if count == 0:
        raise KernelBuildError("the cuda kernels cannot be built: torch sees no CUDA GPU")
    found = []
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < OLDEST:
            raise KernelBuildError(
                f"the cuda kernels need compute capability 8.0 or later, and GPU {index} "
                f"({torch.cuda.get_device_name(index)}) has {major}.{minor}"
            )
        found.append(_accelerated(f"{major}{minor}"))
    return tuple(dict.fromkeys(found))


def gpus_are_served() -> bool:
    """Whether there are GPUs and all have kernels, or ``INT8COMPILE_CUDA_ARCHS`` asks for some (rightly or not)."""
    if cuda_archs() is not None:
        return True
    try:
        return bool(architectures())
    except KernelBuildError:
        return False


def _checked(name: str) -> str:
    if not re.fullmatch(r"\d{2,3}[af]?", name) or int(name.rstrip("af")) < OLDEST:
        raise KernelBuildError(
            f"INT8COMPILE_CUDA_ARCHS names {name!r}; expected architectures from {OLDEST} on, as in '80;90a'"
        )
    return _accelerated(name)


def _accelerated(name: str) -> str:
    """wgmma is in sm_90a only, which runs on every GPU of capability 9.0 and on no other."""
    return "90a" if name == "90" else name


def nvcc_flags(architectures: tuple[str, ...]) -> tuple[str, ...]:
    """Code for each architecture and, where the wgmma kernel is among it, a word to the host code that it is there."""
    flags = tuple(f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures)
    return (*flags, "-DINT8COMPILE_SM90A") if "90a" in architectures else flags


def nvcc() -> Path | None:
    """The compiler of the toolkit that torch's builder uses: CUDA_HOME, else nvcc on PATH, else /usr/local/cuda."""
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    path = None if home is None else Path(home) / "bin" / "nvcc"
    return path if path is not None and path.exists() else None
