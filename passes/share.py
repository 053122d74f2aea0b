"""share: an activation that feeds several int8 linears which ``merge`` did not join is quantised once.

    y0 = int8compile.linear(x, w0, s0, b0, t, p)         c, r, o = int8compile.quantize_rowwise(x, t)
    y1 = int8compile.linear(x, w1, s1, b1, t, p)    ->   y0 = int8compile.scaled_mm(c, r, x, o, w0, s0, b0, dtype, ...)
                                                         y1 = int8compile.scaled_mm(c, r, x, o, w1, s1, b1, dtype, ...)

A joined product is one of the linears, if others read its activation too. Not shared: a single reader; readers with x
changed in place between them; readers in different autocast or gradient regions; linears of which the weights alone are
int8, or whose columns are calibrated. (Inductor would not find this: to it
the operators are opaque.)
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from int8compile.config import CALIBRATED, WEIGHTS_ONLY
from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import quantize_rowwise, scaled_mm
from int8compile.ops.linear import effective_threshold, residual_from
from int8compile.passes.analysis.readers import LinearCall, readers
from int8compile.passes.context import PassContext


def share(graph: fx.Graph, context: PassContext) -> int:
    runs = readers(graph, context, context.effects())
    runs = [run for run in runs if LinearCall.of(run[0]).outlier_policy not in (WEIGHTS_ONLY, CALIBRATED)]
    for run in runs:
        _share(context, run)
    return sum(map(len, runs))


def _share(context: PassContext, run: list[fx.Node]) -> None:
    first, of_first = run[0], LinearCall.of(run[0])
    threshold = effective_threshold(of_first.threshold, of_first.outlier_policy)
    quantized = context.call(first, quantize_rowwise, (of_first.x, threshold), like=first)
    values = cast(tuple[torch.Tensor, ...], meta_value(quantized))
    codes, row_scale, outliers = (
        context.call(first, operator.getitem, (quantized, i), like=first, value=value) for i, value in enumerate(values)
    )
    for node in run:
        x, weight, weight_scale, bias, _, outlier_policy, *_ = LinearCall.of(node)
        out = meta_tensor(node)
        assert out is not None
        mask, smallest = (outliers if threshold else None), residual_from(threshold, outlier_policy)
        args = (codes, row_scale, x, mask, weight, weight_scale, bias, out.dtype, smallest)
        context.replace(node, context.call(node, scaled_mm, args, like=node, value=out))
