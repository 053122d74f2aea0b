"""``quantize_rowwise``: an activation to int8 codes, one scale for each row, and its outlier columns.

LLM.int8() section 3.2. An element is an outlier when its magnitude reaches the threshold; a column (feature) is an
outlier column when any row has an outlier in it. The row's absmax leaves out outlier *elements* only: other values
of an outlier column are quantised like any other.
"""

from __future__ import annotations

import torch

from int8compile.ops._library import check_activation, check_threshold, define
from int8compile.ops.quantize_weight import row_absmax, row_codes


def _check(x: torch.Tensor, threshold: float) -> None:
    check_activation("quantize_rowwise", x)
    check_threshold("quantize_rowwise", "threshold", threshold, "no outliers")


def _fake(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    k = x.shape[-1]
    m = rows(x)
    return (
        x.new_empty((m, k), dtype=torch.int8),
        x.new_empty((m,), dtype=torch.float32),
        x.new_empty((k,), dtype=torch.bool),
    )


def rows(x: torch.Tensor) -> int:
    """The M of a [..., K] activation flattened to [M, K]; by multiplication, since K may be 0."""
    m = 1
    for size in x.shape[:-1]:
        m = m * size
    return m


def quantize_reference(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] to codes [M, K], row scales [M] and outlier columns [K]."""
    values = x.reshape(rows(x), x.shape[-1]).float()
    magnitudes = values.abs()
    if threshold == 0:
        outliers = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
    else:
        outlier_elements = magnitudes >= threshold
        outliers = outlier_elements.any(dim=0)
        values = torch.where(outlier_elements, 0.0, values)
        magnitudes = torch.where(outlier_elements, 0.0, magnitudes)
    codes, row_scale = row_codes(values, row_absmax(magnitudes))
    return codes, row_scale, outliers


quantize_rowwise = define(
    "quantize_rowwise(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    reference=quantize_reference,
    autocast="x",
)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: object, output: object) -> None:
    ctx.mark_non_differentiable(*output)  # type: ignore[misc,attr-defined]


def _backward(ctx: torch.autograd.function.FunctionCtx, *grads: object) -> tuple[None, None]:
    return None, None


torch.library.register_autograd("int8compile::quantize_rowwise", _backward, setup_context=_setup_context)
