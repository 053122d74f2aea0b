"""Linears for a device, and which kernel computes them: for the tests of a real GPU and for its benchmark.

``python gpu.py`` runs every kernel at a small size, for compute-sanitizer to watch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

THRESHOLD = 6.0
CAPACITY = 128  # kGatherCapacity of csrc/cuda/kernels.h
KERNELS = ("fused", "skinny", "t16x64", "t32x64", "t64x64", "t128x128", "unaligned", "wgmma128", "wgmma256")


class NotApplicableError(Exception):
    """The kernel that is asked for cannot compute this problem."""


def load(device: str) -> None:
    """Register the operators, and on a GPU the native kernels."""
    import int8compile.ops  # noqa: F401
    from int8compile.native import loader

    if device == "cuda":
        loader.load("cuda")


def linear(*args: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.int8compile.linear(*args)
    return out


def problem(
    device: str, m: int, n: int, k: int, dtype: torch.dtype, outliers: int = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k], an int8 weight [n, k], its scale and a bias; ``outliers`` columns of x reach the threshold."""
    with torch.device(device):  # a CPU would need most of a minute for the large ones
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(m, k, generator=generator).clamp(-5.5, 5.5)
        columns = torch.randperm(k, generator=generator)[: min(outliers, k)]
        x[:, columns] *= 0.5
        x[torch.arange(len(columns)) % max(m, 1), columns] = 20.0
        weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale, bias = torch.rand(n, generator=generator) * 0.01 + 1e-4, torch.randn(n, generator=generator)
    return x.to(dtype), weight, scale, bias.to(dtype)


def wgmma_is_used(device: str) -> bool:
    """Whether wgmma kernels were proven here. One that was not may hang, so nothing else may force it either."""
    if device != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        return False
    return str(torch.ops.int8compile_native.cuda_kernel(4096, 4096, 4096, 90, 132, False)).startswith("wgmma")


def kernels(device: str) -> list[str]:
    """Those that may be forced."""
    return [name for name in KERNELS if device == "cuda" and (not name.startswith("wgmma") or wgmma_is_used(device))]


@contextlib.contextmanager
def forced(kernel: str) -> Iterator[None]:
    """Every product on GPUs uses one kernel; ``auto``: the one that is chosen.

    Raises:
        NotApplicableError: a product that it cannot compute.
    """
    if kernel == "auto":
        yield
        return
    force = torch.ops.int8compile_native.force_cuda_kernel
    force(kernel)
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "was asked for, which cannot" in str(error):
            raise NotApplicableError(str(error)) from None
        raise
    finally:
        force("auto")


def main() -> None:
    """Every kernel once."""
    load("cuda")
    for kernel, m, n, k, count in (
        ("fused", 2, 40, 160, 3),
        ("skinny", 5, 40, 1040, 70),
        ("t16x64", 9, 70, 528, 3),
        ("t64x64", 70, 70, 272, CAPACITY + 1),
        ("t128x128", 130, 140, 272, 5),
        ("unaligned", 6, 33, 57, 3),
        ("wgmma128", 130, 136, 272, 5),
        ("wgmma256", 130, 264, 272, CAPACITY + 1),
    ):
        if kernel in kernels("cuda"):
            x, *rest = problem("cuda", m, n, k, torch.bfloat16, count)
            with forced(kernel):
                linear(x, *rest, THRESHOLD, "column")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
