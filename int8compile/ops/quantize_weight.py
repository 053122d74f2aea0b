"""``quantize_weight``: a float weight to int8 codes, one scale for each output channel.

LLM.int8() section 3.1 (vector-wise quantisation); no threshold applies to weights. The arithmetic is fp32 whatever
the weight's dtype. (bitsandbytes goes through fp16 here, which flushes small fp32 weights to zero and gives large
ones an infinite scale.)
"""

from __future__ import annotations

import torch

from int8compile.limits import FLOAT_DTYPES
from int8compile.ops._library import check, define

# Below this magnitude 127 / absmax would overflow fp32; such a channel or row counts as zero.
TINY = 2.0**-120


def row_codes(values: torch.Tensor, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round fp32 ``values`` [R, K] to int8 by their rows' ``absmax`` [R]: codes [R, K] and scale [R] = absmax / 127.

    Ties go to even. A NaN has code 0 and makes its row's scale NaN, so that it comes out as NaN.
    """
    codes, scale = row_integers(values, absmax)
    return codes.to(torch.int8), scale


def row_integers(values: torch.Tensor, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with the codes still in fp32, whatever their size."""
    absmax = torch.where(absmax < TINY, 0.0, absmax)
    # As a reciprocal and a product, which is also what torch makes of 127.0 / absmax: native kernels match the bits.
    inverse = torch.where(absmax == 0, 0.0, absmax.reciprocal() * 127.0)
    return torch.nan_to_num(torch.round(values * inverse.unsqueeze(1)), nan=0.0), absmax / 127.0


def row_absmax(magnitudes: torch.Tensor) -> torch.Tensor:
    """Largest value of each row of [R, K]; 0 where K = 0; NaN where the row has one."""
    if magnitudes.shape[1] == 0:
        return magnitudes.new_zeros(magnitudes.shape[0])
    return magnitudes.amax(dim=1)


def _check(weight: torch.Tensor) -> None:
    check(weight.dim() == 2, "quantize_weight", f"weight has shape {list(weight.shape)}; expected [N, K]")
    check(
        weight.dtype in FLOAT_DTYPES,
        "quantize_weight",
        f"weight has dtype {weight.dtype}; expected float32, float16 or bfloat16",
    )


def _fake(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    n, k = weight.shape
    return weight.new_empty((n, k), dtype=torch.int8), weight.new_empty((n,), dtype=torch.float32)


def _reference(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values = weight.float()
    codes, weight_scale = row_codes(values, row_absmax(values.abs()))
    return codes.contiguous(), weight_scale


quantize_weight = define(
    "quantize_weight(Tensor weight) -> (Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=_reference,
)
