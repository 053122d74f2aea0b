"""LLM.int8() in float64, of one linear and of a whole model: what int8 results are held against.

Written from equation 8 of the paper (arXiv 2208.07339) and sharing no code with the package, nor its formula: here
outlier columns are taken out of the integer product and multiplied apart; there the product stays whole and a residual
is added. Both agree up to the package's float32 rounding, plus a code that comes out one higher or lower where that
rounding moves a value across a half.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import nn

# The error allowed of a whole model. In fp32 both compute the same up to rounding (1e-7), unless that rounding
# moves an activation across the half between two codes. One such flip changes one row of one linear's result by a
# 127th of the row's largest value: about 5e-4 of all the outputs of the zoo's models. This allows for four; none is
# usual. (Leaving the outliers out of it is an error of 1e-2 or more.)
FP32_BOUND = 2e-3
# In bf16 a value that rounds the other way moves by 2**-8 and takes codes behind it along. These models' own float
# outputs in bf16 are 1e-2 to 2e-2 from those in fp32.
BF16_BOUND = 2e-2


class Rows(NamedTuple):
    """An activation in int8: codes [M, K], scale [M], and which of the K columns have an outlier, bool [K]."""

    codes: torch.Tensor
    scale: torch.Tensor
    columns: torch.Tensor


def weight_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and scale [N], in float64, of a float weight [N, K]: absmax of each output channel."""
    return _codes(weight.detach().double())


def row_codes(x: torch.Tensor, threshold: float) -> Rows:
    """An activation [M, K] in int8, in float64. Elements that reach the threshold are outliers; 0: there are none."""
    values = x.detach().double()
    outlier = values.abs() >= threshold if threshold > 0 else torch.zeros_like(values, dtype=torch.bool)
    return Rows(*_codes(values.masked_fill(outlier, 0.0)), outlier.any(dim=0))


def _codes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # The zero beside them makes the largest magnitude of no values 0.
    absmax = nn.functional.pad(values.abs(), (0, 1)).amax(dim=1)
    codes = torch.where(absmax[:, None] > 0, torch.round(values * (127.0 / absmax)[:, None]), 0.0)
    return codes, absmax / 127.0


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    policy: str = "column",
    rows: Rows | None = None,
    true_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """LLM.int8() of x [..., K] with an int8 weight [N, K]: float64 [..., N].

    Outlier columns (policy "column"), elements ("element") or all there is ("all") are multiplied as they are with the
    dequantised weight; everything else goes through its int8 code.

    Args:
        rows: x in int8, where it shall not be computed here.
        true_weight: float [N, K] that outliers are multiplied with instead.
    """
    flat = x.detach().double().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    q, row_scale, columns = row_codes(flat, threshold) if rows is None else rows
    if policy == "all":
        columns = torch.ones_like(columns)
    exact = columns.expand(flat.shape) if policy in ("column", "all") else columns & (flat.abs() >= threshold)
    dequantized = codes.double() * scale.double()[:, None]
    weight = dequantized if true_weight is None else true_weight.detach().double()
    covered = torch.where(exact, 0.0, q.double() * row_scale.double()[:, None])
    out = covered @ dequantized.t() + torch.where(exact, flat, 0.0)[:, columns] @ weight[:, columns].t()
    if bias is not None:
        out = out + bias.detach().double()
    return out.reshape(*x.shape[:-1], codes.shape[0])


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> tuple[torch.Tensor, int]:
    """x [..., K] times a float weight [N, K] as a model computes it, rounded once, and how many outlier columns."""
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    inputs = x.detach().to(dtype).reshape(-1, x.shape[-1])
    rows = row_codes(inputs, threshold)
    out = linear(inputs, *weight_codes(weight), bias, threshold, rows=rows)
    return out.to(dtype).reshape(*x.shape[:-1], weight.shape[0]), int(rows.columns.sum())


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference, relative to that of ``expected``."""
    difference = actual.detach().double() - expected.double()
    return float(difference.norm() / expected.double().norm().clamp(min=1e-300))


@dataclasses.dataclass
class Tally:
    """What an emulation met, by weight name: calls, and outlier columns over all calls."""

    calls: Counter[str] = dataclasses.field(default_factory=Counter)
    outlier_columns: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def with_outliers(self) -> int:
        """How many of the weights met an activation with an outlier column."""
        return sum(count > 0 for count in self.outlier_columns.values())


@contextlib.contextmanager
def emulate(model: nn.Module, names: Iterable[str], threshold: float = 6.0) -> Iterator[Tally]:
    """Within the context the named linears of ``model`` compute LLM.int8(); everything else is left as it is.

    Args:
        names: module paths or parameter paths, such as the ``path`` of a Report's rewritten sites. A parameter with
            three dimensions holds experts, whose product has to be ``F.grouped_mm``.
        threshold: an activation of this magnitude makes its column an outlier column; 0: there are none.

    Raises:
        LookupError: a name that is no weight of the model, or one whose weight nothing multiplied by; the comparison
            would be with a model partly in float.
    """
    tally = Tally()
    weights = {id(_weight(model, name)): name for name in names}

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> torch.Tensor:
        """``weight``: a parameter, or rows of one, or one expert's matrix in it."""
        out, outlier_columns = int8_linear(x, weight.t() if transposed else weight, bias, threshold)
        name = weights[_parameter_id(weight)]
        tally.calls[name] += 1
        tally.outlier_columns[name] += outlier_columns
        return out

    with contextlib.ExitStack() as stack:
        # F.linear serves what multiplies by a bare Parameter: attention's in_proj_weight, a router. The fused kernel
        # of nn.TransformerEncoder would go past it.
        stack.enter_context(_fast_path_off())
        stack.enter_context(mock.patch.object(nn.functional, "linear", _by_weight(weights, product)))
        if hasattr(nn.functional, "grouped_mm"):
            stack.enter_context(mock.patch.object(nn.functional, "grouped_mm", _by_experts(weights, product)))
        for module in model.modules():
            # A module's own forward need not call F.linear: Conv1D calls addmm, FalconLinear multiplies by weight.T.
            if id(getattr(module, "weight", None)) in weights and _is_linear(module):
                forward = functools.partial(_forward, module, product)
                stack.enter_context(mock.patch.object(module, "forward", forward, create=True))
        yield tally
    unused = set(weights.values()) - set(tally.calls)
    if unused:
        raise LookupError(f"emulate: nothing multiplied by {', '.join(sorted(unused))}")


def _weight(model: nn.Module, name: str) -> nn.Parameter:
    """The parameter of this name, or the weight of the module of this name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = parameters.get(name, parameters.get(f"{name}.weight"))
    if found is None:
        raise LookupError(f"emulate: the model has no parameter {name!r} or '{name}.weight'")
    return found


def _by_weight(weights: dict[int, str], product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """F.linear, but with the int8 product for the chosen weights."""
    original = nn.functional.linear

    def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ours = _parameter_id(weight) in weights
        return product(input, weight, bias, False) if ours else original(input, weight, bias)

    return linear


def _by_experts(weights: dict[int, str], product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """F.grouped_mm, each of the chosen experts being a linear of its own rows."""
    original = nn.functional.grouped_mm

    def grouped_mm(x: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor, **others: Any) -> torch.Tensor:
        if _parameter_id(weight) not in weights:
            return original(x, weight, offs=offs, **others)
        ends = offs.tolist()
        parts = [
            product(x[begin:end], weight[expert], None, True)  # [K, N], of whatever is stored
            for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))
        ]
        return torch.cat(parts)

    return grouped_mm


def _parameter_id(weight: torch.Tensor) -> int:
    """Of the parameter, or of the one that it is rows of (a part of attention's in_proj_weight)."""
    return id(weight if weight._base is None else weight._base)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _forward(module: nn.Module, product: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    transposed = not isinstance(module, nn.Linear)  # Conv1D stores [K, N]
    return product(x, module.weight, module.bias, transposed)


@contextlib.contextmanager
def _fast_path_off() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
