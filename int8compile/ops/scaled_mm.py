"""``scaled_mm``: the product of an activation that is quantised already, outlier product included.

The one-pass form of LLM.int8() equation 8. Outlier columns are not taken out of the int8 product: outlier elements
have code 0 there, and what the codes leave over in an outlier column,

    r[m, t] = x[m, t] - row_scale[m] * codes[m, t]        (rounded to x's dtype),

is multiplied in x's dtype (16 bits in the paper) with the int8 weight, which every such dtype holds exactly:

    sum[m, n] = row_scale[m] * sum_k codes[m, k] * weight[n, k]  +  sum_t r[m, t] * weight[n, t]
    out[m, n] = weight_scale[n] * sum[m, n] + bias[n]

``outliers=None`` leaves the outlier product out (threshold 0). ``residual_from`` > 0 keeps it to the elements of at
least that magnitude, so that no row depends on another (policy "element"); 0 gives the whole column (the paper's).
Shapes are static and nothing is read on the host, whatever the number of outliers. The epilogue is fp32 with one
rounding to the output's dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from int8compile.limits import FLOAT_DTYPES
from int8compile.ops._library import check, check_activation, check_threshold, check_weight, define
from int8compile.ops.input_gradient import bias_gradient, input_gradient
from int8compile.ops.int_product import int8_product
from int8compile.ops.quantize_rowwise import rows


def product(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    x: torch.Tensor,
    outliers: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual_from: float = 0.0,
) -> torch.Tensor:
    """The body of ``scaled_mm`` and, after quantising, of ``linear``."""
    m, k = codes.shape
    weight_float = None if outliers is None else weight.float()
    acc = int8_product(codes, weight, weight_float).float() * row_scale.unsqueeze(1)
    if outliers is not None and weight_float is not None:
        values = x.reshape(m, k).float()
        # An unflagged column must not add anything, not even the NaN of a row whose scale is NaN.
        carries = outliers & (values.abs() >= residual_from) if residual_from > 0 else outliers
        residual = torch.where(carries, values - row_scale.unsqueeze(1) * codes.float(), 0.0).to(x.dtype)
        acc = acc + residual.float() @ weight_float.t()
    out = acc * weight_scale
    if bias is not None:
        out = out + bias.float()
    return out.to(out_dtype).reshape(*x.shape[:-1], weight.shape[0])


def _check(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    x: torch.Tensor,
    outliers: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual_from: float = 0.0,
) -> None:
    check_activation("scaled_mm", x)
    m, k = rows(x), x.shape[-1]
    for name, tensor, dtype, shape in (
        ("codes", codes, torch.int8, (m, k)),
        ("row_scale", row_scale, torch.float32, (m,)),
        ("outliers", outliers, torch.bool, (k,)),
    ):
        check(
            tensor is None or (tensor.dtype == dtype and tuple(tensor.shape) == shape),
            "scaled_mm",
            f"{name} is {_kind(tensor)}; for x of shape {list(x.shape)} expected "
            f"{dtype} {list(shape)} (quantize_rowwise makes it)",
        )
    check_weight("scaled_mm", k, weight, weight_scale, bias)
    check(out_dtype in FLOAT_DTYPES, "scaled_mm", f"out_dtype={out_dtype}; expected float32, float16 or bfloat16")
    check_threshold("scaled_mm", "residual_from", residual_from, "whole columns")


def _kind(tensor: torch.Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _fake(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    x: torch.Tensor,
    outliers: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual_from: float = 0.0,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=out_dtype)


# Under autocast ``quantize_rowwise`` quantised x in the autocast dtype, so the residual is of that x too.
scaled_mm = define(
    "scaled_mm(Tensor codes, Tensor row_scale, Tensor x, Tensor? outliers, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, ScalarType out_dtype, float residual_from=0.0) -> Tensor",
    check=_check,
    fake=_fake,
    reference=product,
    autocast="x",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, _, x, _, weight, weight_scale, bias, *_ = inputs
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    grad_x = input_gradient(grad, weight, weight_scale, ctx.x_dtype) if ctx.needs_input_grad[2] else None
    grad_bias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[6] else None
    return None, None, grad_x, None, None, None, grad_bias, None, None


torch.library.register_autograd("int8compile::scaled_mm", _backward, setup_context=_setup_context)
