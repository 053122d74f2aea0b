"""``input_gradient``: the gradient of an int8 linear with respect to its activation.

Quantising is taken as the identity (a straight-through estimate), so the gradient is multiplied by the dequantised
weight:

    dx[m, k] = sum_n (grad[m, n] * weight_scale[n]) * weight[n, k]

The scale goes on the gradient, rounded to the activation's dtype, because int8 codes are exact in 16 bits and
dequantised weights are not. The product is a float one: rows of gradients have no outlier structure to rely on.
"""

from __future__ import annotations

from typing import Any

import torch

from int8compile.limits import FLOAT_DTYPES
from int8compile.ops._library import check, define


def _check(grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> None:
    op = "input_gradient"
    check(
        weight.dim() == 2 and weight.dtype == torch.int8,
        op,
        f"weight is {weight.dtype} {list(weight.shape)}; expected int8 [N, K]",
    )
    n = weight.shape[0]
    check(
        grad.dim() >= 1 and grad.dtype in FLOAT_DTYPES and grad.shape[-1] == n,
        op,
        f"grad is {grad.dtype} {list(grad.shape)}; expected float32, float16 or bfloat16 [..., {n}]",
    )
    check(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (n,),
        op,
        f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}; expected float32 [{n}]",
    )
    check(dtype in FLOAT_DTYPES, op, f"dtype={dtype}; expected float32, float16 or bfloat16")


def _fake(grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]), dtype=dtype)


def _reference(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return (grad.float() * weight_scale).to(dtype) @ weight.to(dtype)


input_gradient = define(
    "input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, ScalarType dtype) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, weight, weight_scale, _ = inputs
    ctx.grad_dtype = grad.dtype
    ctx.save_for_backward(weight, weight_scale)


def _backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The map is linear in grad, so its own gradient is the transposed map: a float linear with the same weight."""
    weight, weight_scale = ctx.saved_tensors
    back = (upstream @ weight.t().to(upstream.dtype)).float() * weight_scale
    return back.to(ctx.grad_dtype), None, None, None


torch.library.register_autograd("int8compile::input_gradient", _backward, setup_context=_setup_context)


def bias_gradient(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of grad [..., N] over all rows, in fp32."""
    if grad.dim() == 1:
        return grad.to(dtype)
    return grad.sum(dim=tuple(range(grad.dim() - 1)), dtype=torch.float32).to(dtype)
