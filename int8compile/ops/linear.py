"""``linear``: quantise the activation and multiply, in one operator; LLM.int8() as a whole.

``quantize_rowwise`` followed by ``scaled_mm``, which is where the numerics are written down. Under the outlier policy
"all" every column is an outlier column, so that nothing of the activation is quantised and the weight alone is int8:

    out[m, n] = weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]

with x as it is, the sum in fp32 and one rounding to x's dtype; ``threshold`` is of no account then (the passes give 0).

Nor is it under the policies without detection. "none" has no outlier columns. "calibrated" has those of ``columns``,
whatever is in them: a code has 8 bits, and in these columns 16, of the same step in the whole row,

    row_scale[m] = max(max_{k not in columns} |x[m, k]|, max_{k in columns} |x[m, k]| / 128) / 127
    code[m, k]   = round(x[m, k] / row_scale[m])     = 128 high[m, k] + low[m, k], and high is 0 outside the columns
    out[m, n]    = row_scale[m] * weight_scale[n] * (sum_k low[m, k] * weight[n, k]
                                                     + 128 * sum_t high[m, t] * column_weight[n, t]) + bias[n]

with both sums in int32. So an output depends on its row alone, and no sum on the order of its terms. ``column_weight``
is ``weight[:, columns]``, for callers that know when the weight changes; without it that is read from the weight.
"""

from __future__ import annotations

from typing import Any

import torch

from int8compile.ops._library import (
    check,
    check_activation,
    check_outlier_policy,
    check_threshold,
    check_weight,
    define,
)
from int8compile.ops.input_gradient import bias_gradient, input_gradient
from int8compile.ops.int_product import int8_product
from int8compile.ops.quantize_rowwise import quantize_reference, rows
from int8compile.ops.quantize_weight import row_absmax, row_integers
from int8compile.ops.scaled_mm import product

#: policies under which nothing is compared with the threshold
WITHOUT_THRESHOLD = ("none", "calibrated", "all")


def effective_threshold(threshold: float, outlier_policy: str) -> float:
    """What activations are compared with; 0: nothing."""
    return 0.0 if outlier_policy in WITHOUT_THRESHOLD else threshold


def residual_from(threshold: float, outlier_policy: str) -> float:
    """The smallest magnitude that carries a residual under an outlier policy (see ``scaled_mm``)."""
    return threshold if outlier_policy == "element" else 0.0


def weight_only(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The body under policy "all"."""
    out = x.reshape(rows(x), x.shape[-1]).float() @ weight.float().t() * weight_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def calibrated_codes(x: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [..., K] to int8 codes [M, K], the high bytes of those in the columns [M, C], and row scales [M]."""
    values, at = x.reshape(rows(x), x.shape[-1]).float(), columns.long()
    chosen = values[:, at]
    absmax = torch.maximum(row_absmax(values.index_fill(1, at, 0.0).abs()), row_absmax(chosen.abs()) / 128.0)
    codes, row_scale = row_integers(values, absmax)
    whole = codes[:, at]
    high = torch.floor((whole + 64.0) / 128.0)
    return codes.index_copy(1, at, whole - 128.0 * high).to(torch.int8), high.to(torch.int8), row_scale


def calibrated(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    columns: torch.Tensor,
    column_weight: torch.Tensor,
) -> torch.Tensor:
    """The body under policy "calibrated"."""
    codes, high, row_scale = calibrated_codes(x, columns)
    sums = int8_product(codes, weight).float() + 128.0 * int8_product(high, column_weight).float()
    out = sums * row_scale.unsqueeze(1) * weight_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
    columns: torch.Tensor | None = None,
    column_weight: torch.Tensor | None = None,
) -> None:
    check_activation("linear", x)
    check_threshold("linear", "threshold", threshold, "no outliers")
    check_outlier_policy("linear", outlier_policy, "calibrated")
    check_weight("linear", x.shape[-1], weight, weight_scale, bias)
    absent = columns is None and column_weight is None
    check(
        columns is not None if outlier_policy == "calibrated" else absent,
        "linear",
        f"outlier_policy={outlier_policy!r} with columns {_given(columns)} and column_weight {_given(column_weight)}; "
        "expected columns with policy 'calibrated', and neither with any other",
    )
    if columns is None:
        return
    check(
        columns.dtype == torch.int32 and columns.dim() == 1,
        "linear",
        f"columns is {columns.dtype} {list(columns.shape)}; expected int32 [C], features in ascending order",
    )
    if column_weight is None:
        return
    check(
        column_weight.dtype == torch.int8 and tuple(column_weight.shape) == (weight.shape[0], columns.shape[0]),
        "linear",
        f"column_weight is {column_weight.dtype} {list(column_weight.shape)}; expected int8 "
        f"[{weight.shape[0]}, {columns.shape[0]}], which is weight[:, columns]",
    )


def _given(tensor: torch.Tensor | None) -> str:
    return "absent" if tensor is None else "given"


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
    columns: torch.Tensor | None = None,
    column_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
    columns: torch.Tensor | None = None,
    column_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    if outlier_policy == "all":
        return weight_only(x, weight, weight_scale, bias)
    if columns is not None:
        column_weight = weight.index_select(1, columns) if column_weight is None else column_weight
        return calibrated(x, weight, weight_scale, bias, columns, column_weight)
    threshold = effective_threshold(threshold, outlier_policy)
    codes, row_scale, found = quantize_reference(x, threshold)
    outliers = None if threshold == 0 else found
    smallest = residual_from(threshold, outlier_policy)
    return product(codes, row_scale, x, outliers, weight, weight_scale, bias, x.dtype, smallest)


linear = define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, "
    'str outlier_policy="column", Tensor? columns=None, Tensor? column_weight=None) -> Tensor',
    check=_check,
    fake=_fake,
    reference=_reference,
    autocast="x",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, bias, *_ = inputs
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = input_gradient(grad, weight, weight_scale, ctx.x_dtype) if ctx.needs_input_grad[0] else None
    grad_bias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[3] else None
    return grad_x, None, None, grad_bias, None, None, None, None


torch.library.register_autograd("int8compile::linear", _backward, setup_context=_setup_context)
