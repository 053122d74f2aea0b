"""merge: linears that read one quantised activation become one product, its result split.

    y0 = int8compile.scaled_mm(q, r, x, o, w0, s0, b0, ...)        y = int8compile.linear(x, w01, s01, cat(b0, b1), ...)
    y1 = int8compile.scaled_mm(q, r, x, o, w1, s1, b1, ...)   ->   y0 = narrow(y, 0, n0).contiguous()
                                                                   y1 = narrow(y, n0, n1).contiguous()

Scales are one an output channel, so joining rows is exact. ``w01`` is one lifted input, in which the weight store keeps
w0 and w1 once. When all readers of the quantised activation merge, it needs no quantise of its own and the whole is one
``int8compile.linear``. The copies make each result a tensor of its own, as the user's code expects (it may reshape
it or write to it); inductor fuses them into what reads them.

Not merged: biases that are computed only after the first of the products.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from int8compile.graph_text import meta_tensor
from int8compile.ops import linear, scaled_mm
from int8compile.passes.context import PassContext

aten = torch.ops.aten


def merge(graph: fx.Graph, context: PassContext) -> int:
    groups: dict[object, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=scaled_mm):
        codes, row_scale, x, outliers, _, _, _, *rest = node.args
        groups.setdefault((codes, row_scale, x, outliers, *rest), []).append(node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    changes = 0
    for group in groups.values():
        ready = [n for n in group if not isinstance(n.args[6], fx.Node) or order[n.args[6]] < order[group[0]]]
        if len(ready) > 1:
            _merge(graph, context, ready, whole=len(ready) == len(group))
            changes += len(ready)
    return changes


def _merge(graph: fx.Graph, context: PassContext, group: list[fx.Node], whole: bool) -> None:
    first = group[0]
    lifted_of = {lifted.weight: lifted for lifted in context.capture.lifted.values()}
    lifted = context.capture.lift(tuple(m for node in group for m in lifted_of[node.args[4]].members))
    product = _product(context, group, lifted.weight, lifted.scale, whole)
    start = 0
    for node in group:
        value = meta_tensor(node)
        assert value is not None
        rows = value.shape[-1]
        part = context.call(first, aten.narrow.default, (product, -1, start, rows), like=node)
        own = context.call(first, aten.clone.default, (part,), like=node, value=value)
        own.kwargs = {"memory_format": torch.contiguous_format}
        node.replace_all_uses_with(own)
        context.sites[own] = context.sites.pop(node)
        start += rows
    quantized = first.args[0].args[0] if isinstance(first.args[0], fx.Node) else None
    for node in reversed(group):
        graph.erase_node(node)
    if whole and isinstance(quantized, fx.Node):
        _erase_quantize(graph, quantized)


def _product(context: PassContext, group: list[fx.Node], weight: fx.Node, scale: fx.Node, whole: bool) -> fx.Node:
    first = group[0]
    codes, row_scale, x, outliers, _, _, _, out_dtype, residual = first.args
    bias = _joined_bias(context, group)
    assert isinstance(codes, fx.Node)
    quantized = codes.args[0]
    assert isinstance(quantized, fx.Node)
    like, value = meta_tensor(first), meta_tensor(weight)
    assert like is not None
    assert value is not None
    with context.capture.fake_mode:
        joined = like.new_empty((*like.shape[:-1], value.shape[0]))
    if whole:
        policy = "element" if residual else "column"
        args = (x, weight, scale, bias, quantized.args[1], policy)
        return context.call(first, linear, args, like=first, value=joined)
    args = (codes, row_scale, x, outliers, weight, scale, bias, out_dtype, residual)
    return context.call(first, scaled_mm, args, like=first, value=joined)


def _joined_bias(context: PassContext, group: list[fx.Node]) -> fx.Node | None:
    """The biases end to end, zeros where there is none; None if no one has one."""
    first = group[0]
    if all(node.args[6] is None for node in group):
        return None
    given = next(node.args[6] for node in group if node.args[6] is not None)
    parts = []
    for node in group:
        value = meta_tensor(node)
        assert value is not None
        missing = node.args[6] is None
        parts.append(
            context.call(first, aten.new_zeros.default, (given, [value.shape[-1]]), like=first) if missing else node.args[6]
        )
    return context.call(first, aten.cat.default, (parts,), like=first)


def _erase_quantize(graph: fx.Graph, quantized: fx.Node) -> None:
    for user in list(quantized.users):
        if user.target is operator.getitem and not user.users:
            graph.erase_node(user)
    if not quantized.users:
        graph.erase_node(quantized)
