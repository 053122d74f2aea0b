"""The exact int32 product of two int8 matrices, by whatever this device does fastest.

Three routes, all bit-exact:

* CPUs with int8 dot products (VNNI, AMX): ``torch._int_mm``.
* CUDA: ``torch._int_mm`` (cuBLASLt) on operands padded to the shapes it takes.
* anything else: fp32 products over slices of K short enough that every partial sum is an integer below 2**24,
  which fp32 holds exactly. On an AVX2 CPU ``_int_mm`` is a scalar loop, 30 times slower than this.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

_EXACT_IN_FP32 = 1024  # 127 * 127 * 1024 < 2**24


def int8_product(a: torch.Tensor, b: torch.Tensor, b_float: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b.T`` for int8 a [M, K] and b [N, K], as int32 [M, N], exact for K <= 131072.

    Args:
        b_float: ``b.float()``, if the caller has it; saves making it where it is needed.
    """
    if a.device.type == "cuda":
        return _cublas_product(a, b)
    if a.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return _int_mm(a, b)
    return _fp32_product(a, b.float() if b_float is None else b_float)


def _fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    parts: list[torch.Tensor] = [
        (p.float() @ q.t()).to(torch.int32)
        for p, q in zip(a.split(_EXACT_IN_FP32, dim=1), b.split(_EXACT_IN_FP32, dim=1), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _cublas_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cuBLASLt wants M > 16 and K, N multiples of 8 above 0; zeros added to any of them change no sum."""
    m, k = a.shape
    n = b.shape[0]
    more_k, more_n = torch.sym_max(8 - k, -k % 8), torch.sym_max(8 - n, -n % 8)
    a = pad(a, (0, more_k, 0, torch.sym_max(17 - m, 0)))
    b = pad(b, (0, more_k, 0, more_n))
    return _int_mm(a, b)[:m, :n]


def _int_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch._int_mm(a, b.t())
    return product
