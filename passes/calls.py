"""The arguments of our operators' nodes, by name."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import fx


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """All arguments of an operator's call in the order of its schema, however they were written."""
    rest = cast(torch._ops.OpOverload, node.target)._schema.arguments[len(node.args) :]
    return (*node.args, *(node.kwargs.get(a.name, a.default_value) for a in rest))


class LinearCall(NamedTuple):
    """``int8compile.linear(x, weight, scale, bias, threshold, policy)``"""

    x: fx.Node
    weight: fx.Node
    scale: fx.Node
    bias: fx.Node | None
    threshold: float
    policy: str

    @classmethod
    def of(cls, node: fx.Node) -> LinearCall:
        return cls(*arguments(node))

    @staticmethod
    def threshold_of(quantized: fx.Node) -> float:
        """The threshold a ``quantize_rowwise`` node was given."""
        return cast(float, quantized.args[1])


class ScaledMmCall(NamedTuple):
    """``int8compile.scaled_mm(codes, row_scale, x, outliers, weight, scale, bias, out_dtype, residual_from)``"""

    codes: fx.Node
    row_scale: fx.Node
    x: fx.Node
    outliers: fx.Node | None
    weight: fx.Node
    scale: fx.Node
    bias: fx.Node | None
    out_dtype: torch.dtype
    residual_from: float

    @classmethod
    def of(cls, node: fx.Node) -> ScaledMmCall:
        return cls(*arguments(node))

    @property
    def activation(self) -> tuple[object, ...]:
        """All but the weight and the bias: calls that agree in it can be one product."""
        return self.codes, self.row_scale, self.x, self.outliers, self.out_dtype, self.residual_from

    @property
    def quantized(self) -> fx.Node:
        """The ``quantize_rowwise`` node whose codes it reads."""
        return cast(fx.Node, self.codes.args[0])
