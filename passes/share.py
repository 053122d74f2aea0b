"""share: an activation that feeds several int8 linears (q/k/v, gate/up) is quantised once.

    y0 = int8compile.linear(x, w0, s0, b0, t, p)         q, r, o = int8compile.quantize_rowwise(x, t)
    y1 = int8compile.linear(x, w1, s1, b1, t, p)    ->   y0 = int8compile.scaled_mm(q, r, x, o, w0, s0, b0, dtype, ...)
                                                         y1 = int8compile.scaled_mm(q, r, x, o, w1, s1, b1, dtype, ...)

Not shared: a single consumer; consumers with x changed in place between them; consumers in different autocast or
gradient regions. (Inductor would not find this: to it the operators are opaque.)
"""

from __future__ import annotations

import operator

from torch import fx

from int8compile.graph_text import meta_tensor
from int8compile.ops import linear, quantize_rowwise, scaled_mm
from int8compile.ops.linear import residual_from
from int8compile.passes.context import PassContext
from int8compile.passes.effects import changes_between, regions


def share(graph: fx.Graph, context: PassContext) -> int:
    return sum(_share(context, group) for group in _groups(graph, context))


def _groups(graph: fx.Graph, context: PassContext) -> list[list[fx.Node]]:
    """Runs of linears that read the same values of the same x, in graph order."""
    where = regions(graph, context.grad_enabled)
    groups: dict[object, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        x, _, _, _, threshold, policy = node.args
        out = meta_tensor(node)
        runs = groups.setdefault((x, threshold, policy, None if out is None else out.dtype, where[node]), [])
        if runs and not changes_between(graph, x, runs[-1][-1], node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return [run for runs in groups.values() for run in runs if len(run) > 1]


def _share(context: PassContext, group: list[fx.Node]) -> int:
    first = group[0]
    x, _, _, _, threshold, policy = first.args
    quantized = context.call(first, quantize_rowwise, (x, threshold), like=first)
    value = quantized.meta.get("example_value", quantized.meta.get("val"))
    codes, row_scale, outliers = (
        context.call(first, operator.getitem, (quantized, i), like=first, value=value[i]) for i in range(3)
    )
    for node in group:
        _, weight, scale, bias, _, _ = node.args
        out = meta_tensor(node)
        assert out is not None
        mask = outliers if threshold else None
        args = (codes, row_scale, x, mask, weight, scale, bias, out.dtype, residual_from(threshold, policy))
        new = context.call(node, scaled_mm, args, like=node, value=out)
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
        context.sites[new] = context.sites.pop(node)
    if not outliers.users:
        outliers.graph.erase_node(outliers)
    return len(group)
