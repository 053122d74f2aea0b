"""``grouped_linear``: the linears of a layer's experts in one operator, each on rows of its own.

The rows of ``x`` are sorted by expert, as ``torch._grouped_mm`` takes them: those of expert e begin where those of
expert e - 1 end, and end before ``offsets[e]``. Expert e computes what ``linear`` does of its rows alone,

    out[begin:end] = linear(x[begin:end], weight[e], weight_scale[e], bias[e], threshold, outlier_policy)

so outlier columns are an expert's own: a large activation in one expert's rows changes no other's result. An expert
without rows costs nothing. Rows that belong to none, at or past the last offset, come out as 0 (``torch._grouped_mm``
leaves their memory as it finds it).

Offsets are values, which nothing reads on the host. So they are taken as they can be: below 0 as 0, past the rows as
their number, and one that is below an earlier one as that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8compile.limits import FLOAT_DTYPES, MAX_IN_FEATURES
from int8compile.ops._library import check, check_activation, check_outlier_policy, check_threshold, define
from int8compile.ops.linear import effective_threshold, residual_from, weight_only
from int8compile.ops.quantize_rowwise import quantize_reference
from int8compile.ops.scaled_mm import product


def expert_of_rows(offsets: torch.Tensor, rows: int) -> torch.Tensor:
    """The expert of each row [S], E for a row of none; the one place that says what odd offsets mean."""
    ends = offsets.clamp(0, rows).cummax(0).values if offsets.shape[0] else offsets
    return torch.searchsorted(ends, torch.arange(rows, dtype=ends.dtype, device=ends.device), right=True)


def each_expert(
    offsets: torch.Tensor, out: torch.Tensor, rows_of: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """``out`` [S, ...] with the rows of each expert taken from ``rows_of(expert, its rows [S, 1] as booleans)``.

    That computes all rows, of which the expert's are kept: shapes are static, and no value is read on the host.
    """
    experts = expert_of_rows(offsets, out.shape[0]).unsqueeze(1)
    for expert in range(offsets.shape[0]):
        mine = experts == expert
        out = torch.where(mine, rows_of(expert, mine), out)
    return out


def check_experts(op: str, weight: torch.Tensor, weight_scale: torch.Tensor, offsets: torch.Tensor) -> None:
    """Check int8 weights [E, N, K], their scales [E, N] and the offsets [E] of the experts' rows."""
    check(
        weight.dim() == 3 and weight.dtype == torch.int8,
        op,
        f"weight is {weight.dtype} {list(weight.shape)}; expected int8 [E, N, K]",
    )
    e, n, k = weight.shape
    check(
        k <= MAX_IN_FEATURES,
        op,
        f"in_features={k} is more than {MAX_IN_FEATURES}, up to which int32 sums are exact: split the weight along K",
    )
    check(
        weight_scale.dtype == torch.float32 and tuple(weight_scale.shape) == (e, n),
        op,
        f"weight_scale is {weight_scale.dtype} {list(weight_scale.shape)}; expected float32 [{e}, {n}]",
    )
    check(
        offsets.dtype == torch.int32 and tuple(offsets.shape) == (e,),
        op,
        f"offsets is {offsets.dtype} {list(offsets.shape)}; expected int32 [{e}], where each expert's rows end",
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> None:
    op = "grouped_linear"
    check_activation(op, x)
    check_threshold(op, "threshold", threshold, "no outliers")
    check_outlier_policy(op, outlier_policy)
    check_experts(op, weight, weight_scale, offsets)
    check(x.dim() == 2, op, f"x is {list(x.shape)}; expected [S, K], the rows sorted by expert")
    e, n, k = weight.shape
    check(k == x.shape[1], op, f"weight is {list(weight.shape)}, so it takes {k} features, but x has {x.shape[1]}")
    check(bias is None or tuple(bias.shape) == (e, n), op, f"bias is not [{e}, {n}]")


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[1]))


def _reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    outlier_policy: str = "column",
) -> torch.Tensor:
    out = x.new_zeros((x.shape[0], weight.shape[1]))
    if outlier_policy == "all":
        biases: Sequence[torch.Tensor | None] = [None] * len(weight) if bias is None else bias.unbind()
        return each_expert(offsets, out, lambda e, _: weight_only(x, weight[e], weight_scale[e], biases[e]))
    threshold = effective_threshold(threshold, outlier_policy)
    codes, row_scale, _ = quantize_reference(x, threshold)
    outlier_elements = None if threshold == 0 else x.float().abs() >= threshold
    smallest = residual_from(threshold, outlier_policy)

    def rows_of(expert: int, mine: torch.Tensor) -> torch.Tensor:
        columns = None if outlier_elements is None else (outlier_elements & mine).any(dim=0)
        offset = None if bias is None else bias[expert]
        return product(codes, row_scale, x, columns, weight[expert], weight_scale[expert], offset, x.dtype, smallest)

    return each_expert(offsets, out, rows_of)


# No autocast: a grouped product of torch's has none either.
grouped_linear = define(
    "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor offsets, Tensor? bias, float threshold, "
    'str outlier_policy="column") -> Tensor',
    check=_check,
    fake=_fake,
    reference=_reference,
)


def _check_gradient(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> None:
    op = "grouped_input_gradient"
    check_experts(op, weight, weight_scale, offsets)
    n = weight.shape[1]
    check(
        grad.dim() == 2 and grad.dtype in FLOAT_DTYPES and grad.shape[1] == n,
        op,
        f"grad is {grad.dtype} {list(grad.shape)}; expected float32, float16 or bfloat16 [S, {n}]",
    )
    check(dtype in FLOAT_DTYPES, op, f"dtype={dtype}; expected float32, float16 or bfloat16")


def _fake_gradient(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return grad.new_empty((grad.shape[0], weight.shape[2]), dtype=dtype)


def _reference_gradient(
    grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    def rows_of(expert: int, mine: torch.Tensor) -> torch.Tensor:
        return (grad.float() * weight_scale[expert]).to(dtype) @ weight[expert].to(dtype)

    return each_expert(offsets, grad.new_zeros((grad.shape[0], weight.shape[2]), dtype=dtype), rows_of)


#: ``input_gradient`` of each expert's rows; 0 for those of none
grouped_input_gradient = define(
    "grouped_input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, Tensor offsets, ScalarType dtype) "
    "-> Tensor",
    check=_check_gradient,
    fake=_fake_gradient,
    reference=_reference_gradient,
)


def grouped_bias_gradient(grad: torch.Tensor, offsets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums of grad [S, N] over each expert's rows, in fp32: [E, N]."""
    experts = expert_of_rows(offsets, grad.shape[0])
    sums = torch.zeros((offsets.shape[0] + 1, grad.shape[1]), dtype=torch.float32, device=grad.device)
    result: torch.Tensor = sums.index_add(0, experts, grad.float())[:-1].to(dtype)
    return result


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, weight_scale, offsets, bias, *_ = inputs
    ctx.x_dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight, weight_scale, offsets)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, weight_scale, offsets = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    grad_x = grouped_input_gradient(grad, weight, weight_scale, offsets, ctx.x_dtype) if wanted[0] else None
    grad_bias = grouped_bias_gradient(grad, offsets, ctx.bias_dtype) if wanted[4] else None
    return grad_x, None, None, None, grad_bias, None, None


torch.library.register_autograd("int8compile::grouped_linear", _backward, setup_context=_setup_context)


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    grad, weight, weight_scale, offsets, _ = inputs
    ctx.grad_dtype = grad.dtype
    ctx.save_for_backward(weight, weight_scale, offsets)


def _backward_of_gradient(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The map is linear in grad, so its own gradient is the transposed map: float linears with the same weights."""
    weight, weight_scale, offsets = ctx.saved_tensors

    def rows_of(expert: int, mine: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = (upstream @ weight[expert].t().to(upstream.dtype)).float() * weight_scale[expert]
        return rows

    zeros = upstream.new_zeros((upstream.shape[0], weight.shape[1]), dtype=torch.float32)
    return each_expert(offsets, zeros, rows_of).to(ctx.grad_dtype), None, None, None, None


torch.library.register_autograd(
    "int8compile::grouped_input_gradient", _backward_of_gradient, setup_context=_setup_gradient
)
