"""``master_linear``: LLM.int8() on a weight that stays in 16 (or 32) bits and trains (``llm_int8_has_fp16_weight``).

Activation and weight are both quantised at each call, so an optimiser's step is in the next product, in training and
in evaluation alike. Outlier columns are multiplied with the weight itself, as the paper has it (section 3.2), and not
with its int8 form (bitsandbytes leaves that as a TODO):

    out[m, n] = row_scale[m] * weight_scale[n] * sum_{k not exact} codes[m, k] * weight_codes[n, k]
              + sum_{k exact} x[m, k] * weight[n, k] + bias[n]

*Exact* are the outlier columns (policy "column") or the outlier elements alone (policy "element").

Gradients are those of a float linear, straight through the rounding: grad_x = grad @ weight, grad_weight = grad.T @ x,
with every column of x in it once.
"""

from __future__ import annotations

from typing import Any

import torch

from int8compile.limits import FLOAT_DTYPES, MAX_IN_FEATURES
from int8compile.ops._library import check, check_activation, check_outlier_policy, check_threshold, define
from int8compile.ops.input_gradient import bias_gradient
from int8compile.ops.quantize_rowwise import quantize_rowwise, rows
from int8compile.ops.quantize_weight import quantize_weight
from int8compile.ops.scaled_mm import scaled_mm


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> None:
    check_activation("master_linear", x)
    check(
        weight.dim() == 2 and weight.dtype in FLOAT_DTYPES,
        "master_linear",
        f"weight is {weight.dtype} {list(weight.shape)}; expected [N, K] in float32, float16 or bfloat16",
    )
    n, k = weight.shape
    check(
        k == x.shape[-1] and k <= MAX_IN_FEATURES,
        "master_linear",
        f"weight is {list(weight.shape)} and x has {x.shape[-1]} features; expected as many, up to {MAX_IN_FEATURES}",
    )
    check(bias is None or tuple(bias.shape) == (n,), "master_linear", f"bias is not [{n}]")
    check_threshold("master_linear", "threshold", threshold, "no outliers")
    check_outlier_policy("master_linear", outlier_policy)
    check(
        outlier_policy != "all",
        "master_linear",
        "outlier_policy='all'; expected 'column', 'element' or 'none': without a quantised activation this is a float "
        "linear (torch.nn.functional.linear)",
    )


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    threshold = 0.0 if outlier_policy == "none" else threshold
    weight_codes, weight_scale = quantize_weight(weight)
    codes, row_scale, columns = quantize_rowwise(x, threshold)
    values = x.reshape(codes.shape)
    if threshold == 0:
        exact = None
    else:
        exact = columns if outlier_policy == "column" else values.float().abs() >= threshold
        codes = torch.where(exact, 0, codes)
    out = scaled_mm(codes, row_scale, values, None, weight_codes, weight_scale, None, torch.float32)
    if exact is not None:
        outliers = torch.where(exact, values, 0.0).float()
        out = out + outliers @ weight.to(x.dtype).float().t()
    if bias is not None:
        out = out + bias.float()
    result: torch.Tensor = out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])
    return result


master_linear = define(
    'master_linear(Tensor x, Tensor weight, Tensor? bias, float threshold, str outlier_policy="column") -> Tensor',
    check=_check,
    fake=_fake,
    reference=_reference,
    autocast="x",  # the weight is quantised from what it is
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, bias, *_ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.weight_dtype = weight.dtype
    # Each for the other's gradient, and only then: what is not saved may be written to before the backward pass.
    to_x, to_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if to_weight else None, weight if to_x else None)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    grad_x = grad @ weight.to(grad.dtype) if ctx.needs_input_grad[0] else None
    grad_weight = weight_gradient(grad, x).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
    grad_bias = bias_gradient(grad, ctx.bias_dtype) if ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_bias, None, None


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """grad [..., N] and x [..., K] to the gradient of the weight, [N, K]."""
    m = rows(x)
    return grad.reshape(m, grad.shape[-1]).t() @ x.reshape(m, x.shape[-1])


torch.library.register_autograd("int8compile::master_linear", _backward, setup_context=_setup_context)
