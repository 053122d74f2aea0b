"""share: an activation that feeds several int8 linears (q/k/v, gate/up) is quantised once.

    y0 = int8compile.linear(x, w0, s0, b0, t, p)         q, r, o = int8compile.quantize_rowwise(x, t)
    y1 = int8compile.linear(x, w1, s1, b1, t, p)    ->   y0 = int8compile.scaled_mm(q, r, x, o, w0, s0, b0, dtype, ...)
                                                         y1 = int8compile.scaled_mm(q, r, x, o, w1, s1, b1, dtype, ...)

Not shared: a single consumer; consumers with x changed in place between them; consumers in different autocast or
gradient regions. (Inductor would not find this: to it the operators are opaque.)
"""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import fx

from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import linear, quantize_rowwise, scaled_mm
from int8compile.ops.linear import residual_from
from int8compile.passes.analysis import Effects, regions
from int8compile.passes.calls import LinearCall, ScaledMmCall
from int8compile.passes.context import PassContext


def share(graph: fx.Graph, context: PassContext) -> int:
    return sum(_share(context, group) for group in _groups(graph, context))


def _groups(graph: fx.Graph, context: PassContext) -> list[list[fx.Node]]:
    """Runs of linears that read the same values of the same x, in graph order."""
    where, effects = regions(graph, context.grad_enabled), Effects(graph)
    groups: dict[object, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        if not node.users:  # the user's own, and left to the compiler
            continue
        call, out = LinearCall.of(node), meta_tensor(node)
        key = (call.x, call.threshold, call.policy, None if out is None else out.dtype, where[node])
        runs = groups.setdefault(key, [])
        if runs and effects.readable_at(call.x, runs[-1][0], node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return [run for runs in groups.values() for run in runs if len(run) > 1]


def _share(context: PassContext, group: list[fx.Node]) -> int:
    first, of_first = group[0], LinearCall.of(group[0])
    quantized = context.call(first, quantize_rowwise, (of_first.x, of_first.threshold), like=first)
    values = cast(tuple[torch.Tensor, ...], meta_value(quantized))
    codes, row_scale, outliers = (
        context.call(first, operator.getitem, (quantized, i), like=first, value=value) for i, value in enumerate(values)
    )
    for node in group:
        x, weight, scale, bias, threshold, policy = LinearCall.of(node)
        out = meta_tensor(node)
        assert out is not None
        mask, smallest = (outliers if threshold else None), residual_from(threshold, policy)
        args = ScaledMmCall(codes, row_scale, x, mask, weight, scale, bias, out.dtype, smallest)
        new = context.call(node, scaled_mm, tuple(args), like=node, value=out)
        context.replace(node, new)
    if not outliers.users:
        outliers.graph.erase_node(outliers)
    return len(group)
