"""The choice of what computes the int8 products on a device: native kernels, or the operators' reference bodies.

(The CPU's instruction sets: ``csrc/cpu/providers.cpp``.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from int8compile.errors import KernelBuildError
from int8compile.native import loader
from int8compile.native.builder import LIBRARIES
from int8compile.native.notices import warn_once
from int8compile.native.nvidia import architectures, gpus_are_served


def wanted() -> list[str]:
    """The names of the libraries that serve this machine: ``cuda`` only with GPUs for it, or where it is asked for."""
    return [name for name in LIBRARIES if name != "cuda" or gpus_are_served()]


class Provider(NamedTuple):
    """What computes the int8 products: ``native avx2 (cpu)``, ``reference (cuda)``; for which device, if native."""

    name: str
    native: bool
    device: str | None = None


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
        loader.load(device)
        loader.load("common")
    except KernelBuildError as error:
        if kernels == "native":
            raise
        warn_once(f"int8: {error.args[0].splitlines()[0]}; the slower reference operators are used instead")
        return reference
    return Provider(f"native {_kernel_set(device)} ({device})", native=True, device=device)


def _kernel_set(device: str) -> str:
    """``avx2``; ``sm_90a``."""
    if device == "cuda":
        return ", ".join(f"sm_{name}" for name in architectures())
    return str(torch.ops.int8compile_native.isa())
