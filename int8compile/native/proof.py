"""``python -m int8compile.native.proof LIBRARY DEVICE``: checks the wgmma kernels against the mma.sync kernel.

Exits with 0 if they agree. ``wgmma.py`` runs it in a process of its own: a wrong kernel may hang, or make the CUDA
context unusable.
"""

from __future__ import annotations

import sys

import torch

import int8compile.ops  # noqa: F401 (their schemas come first)


def wgmma_agrees(device: torch.device) -> bool:
    """Small products off the tiles and stages in every dimension, without outlier columns and with some.

    int32 sums are exact, so without outlier columns the outputs have to be the same to the bit.
    """
    native, linear = torch.ops.int8compile_native, torch.ops.int8compile.linear
    generator = torch.Generator().manual_seed(0)
    for m, n, k in ((200, 392, 1552), (65, 8, 16), (300, 520, 4096)):
        x = torch.randn(m, k, generator=generator).clamp(-5, 5)
        weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8).to(device)
        scale, bias = torch.rand(n, generator=generator).to(device), torch.randn(n, generator=generator).to(device)
        for dtype, spikes in ((torch.float32, 0), (torch.bfloat16, 5), (torch.float16, 5), (torch.float32, 5)):
            spiked = x.clone()
            spiked[:, :: max(k // spikes, 1) if spikes else k + 1] *= 20 if spikes else 1
            outs = []
            for kernel in ("t128x128", "wgmma128", "wgmma256"):
                native.force_cuda_kernel(kernel)
                outs.append(linear(spiked.to(device, dtype), weight, scale, bias, 6.0, "column").double().cpu())
            native.force_cuda_kernel("auto")
            bound = float(outs[0].abs().max()) * (2 * torch.finfo(dtype).eps + 1e-5) if spikes else 0.0
            if not all(float((out - outs[0]).abs().max()) <= bound for out in outs[1:]):
                return False
    return True


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    if not wgmma_agrees(torch.device("cuda", int(sys.argv[2]))):
        sys.exit("their results are not those of the mma.sync kernel")
