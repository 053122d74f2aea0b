"""The exact int32 product of two int8 matrices, by whatever this device does fastest.

Three routes, all bit-exact:

* CPUs with int8 dot products (VNNI, AMX): ``torch._int_mm`` on row-major operands (see below).
* CUDA: ``torch._int_mm`` (cuBLASLt) on operands padded to the shapes it takes.
* anything else: fp32 products over slices of K short enough that every partial sum is an integer below 2**24,
  which fp32 holds exactly. On an AVX2 CPU ``_int_mm`` is a scalar loop, 30 times slower than this.

On CPUs with int8 dot products ``torch._int_mm(a, b.t())`` hands the operands' strides to oneDNN, which takes some of
them for another layout and computes wrong numbers, silently. Tried with torch 2.13 on AVX512-VNNI, nineteen layouts of
each operand:

* right: row-major and transposed operands, slices and steps of them, storage offsets, as long as no size is 1;
* wrong: a stride of 0 (expanded rows or columns) or rows that overlap, of either operand; K = 1 with b row-major, whose
  strides are (1, 1); a single row whose stride, which means nothing, is below K, such as one that was expanded. torch
  calls the last two contiguous, so ``contiguous()`` leaves them as they are.

What is wrong in all of these is that strides say less than the shape does. So both operands are made row-major with at
least two rows and two columns, where strides have one meaning and ``contiguous()`` is exact. That copies an operand
only if it is not so already, and in a traced graph it holds for whatever layout inductor chooses: its buffers are
dense, and without a size of 1 a dense one is row-major or transposed.

Even on a CPU with int8 dot products oneDNN may not use them: ``ONEDNN_MAX_CPU_ISA=AVX2`` limits it to AVX2, where its
sums saturate at 16 bits. So the first call multiplies matrices of the largest codes, and CPUs use ``_int_mm`` only if
the result is exact.
"""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import pad

from int8compile.torch_internals.products import cpu_has_int8_dot_products, int_mm

_EXACT_IN_FP32 = 1024  # 127 * 127 * 1024 < 2**24


def cpu_multiplies_int8() -> bool:
    """Whether ``torch._int_mm`` is fast on this CPU, which has int8 dot products, and exact; tests say what it is."""
    return cpu_has_int8_dot_products() and _onednn_is_exact()


@functools.cache
def _onednn_is_exact() -> bool:
    with ThreadPoolExecutor(1) as pool:  # another thread is not within this one's tracing, nor are its tensors fake
        return pool.submit(_largest_codes_are_exact).result()


def _largest_codes_are_exact() -> bool:
    for m, n, k in ((2, 2, 2), (17, 33, 130)):
        a = torch.full((m, k), 127, dtype=torch.int8, device="cpu")
        b = torch.where(torch.arange(n, device="cpu") % 2 == 0, 127, -127).to(torch.int8).unsqueeze(1).repeat(1, k)
        if not torch.equal(_onednn_product(a, b), _fp32_product(a, b.float())):
            return False
    return True


def int8_product(a: torch.Tensor, b: torch.Tensor, b_float: torch.Tensor | None = None) -> torch.Tensor:
    """``a @ b.T`` for int8 a [M, K] and b [N, K], as int32 [M, N], exact for K <= 131072.

    Args:
        b_float: ``b.float()``, if the caller has it; saves making it where it is needed.
    """
    if a.device.type == "cuda":
        return _cublas_product(a, b)
    if a.device.type == "cpu" and cpu_multiplies_int8():
        return _onednn_product(a, b)
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


def _onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return int_mm(_row_major(a), _row_major(b))[: a.shape[0], : b.shape[0]]


def _row_major(codes: torch.Tensor) -> torch.Tensor:
    """Codes [R, K] row-major, with zeros added to what is less than two rows or two columns; they change no sum."""
    rows, columns = codes.shape
    if not (statically_known_true(rows >= 2) and statically_known_true(columns >= 2)):
        codes = pad(codes, (0, torch.sym_max(2 - columns, 0), 0, torch.sym_max(2 - rows, 0)))
    return codes.contiguous()


def _cublas_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """cuBLASLt wants M > 16 and K, N multiples of 8 above 0; zeros added to any of them change no sum."""
    m, k = a.shape
    n = b.shape[0]
    more_k, more_n = torch.sym_max(8 - k, -k % 8), torch.sym_max(8 - n, -n % 8)
    a = pad(a, (0, more_k, 0, torch.sym_max(17 - m, 0)))
    b = pad(b, (0, more_k, 0, more_n))
    return int_mm(a, b)[:m, :n]
