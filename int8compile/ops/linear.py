"""``linear``: quantise the activation and multiply, in one operator; LLM.int8() as a whole.

``quantize_rowwise`` followed by ``scaled_mm``, which is where the numerics are written down. Under the outlier policy
"all" every column is an outlier column, so that nothing of the activation is quantised and the weight alone is int8:

    out[m, n] = weight_scale[n] * sum_k x[m, k] * weight[n, k] + bias[n]

with x as it is, the sum in fp32 and one rounding to x's dtype; ``threshold`` is of no account then (the passes give 0).
"""

from __future__ import annotations

from typing import Any

import torch

from int8compile.ops._library import check_activation, check_outlier_policy, check_threshold, check_weight, define
from int8compile.ops.input_gradient import bias_gradient, input_gradient
from int8compile.ops.quantize_rowwise import quantize_reference, rows
from int8compile.ops.scaled_mm import product


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


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> None:
    check_activation("linear", x)
    check_threshold("linear", "threshold", threshold, "no outliers")
    check_outlier_policy("linear", outlier_policy)
    check_weight("linear", x.shape[-1], weight, weight_scale, bias)


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    if outlier_policy == "all":
        return weight_only(x, weight, weight_scale, bias)
    codes, row_scale, columns = quantize_reference(x, threshold)
    outliers = None if threshold == 0 else columns
    smallest = residual_from(threshold, outlier_policy)
    return product(codes, row_scale, x, outliers, weight, weight_scale, bias, x.dtype, smallest)


linear = define(
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, "
    'str outlier_policy="column") -> Tensor',
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
    return grad_x, None, None, grad_bias, None, None


torch.library.register_autograd("int8compile::linear", _backward, setup_context=_setup_context)
