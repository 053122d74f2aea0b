"""PyTorch's own product of int8 matrices."""

from __future__ import annotations

import torch


def int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b.T`` for int8 a [M, K] and b [N, K], as int32 [M, N]. Which shapes it takes depends on the device."""
    product: torch.Tensor = torch._int_mm(a, b.t())
    return product


def cpu_has_int8_dot_products() -> bool:
    """Whether torch sees VNNI on this CPU, which makes ``int_mm`` fast."""
    return torch.cpu._is_vnni_supported()
