"""merge: linears that read one quantised activation become one product, its result split.

    y0 = int8compile.scaled_mm(q, r, x, o, w0, s0, b0, ...)        y = int8compile.linear(x, w01, s01, cat(b0, b1), ...)
    y1 = int8compile.scaled_mm(q, r, x, o, w1, s1, b1, ...)   ->   y0 = narrow(y, 0, n0).contiguous()
                                                                   y1 = narrow(y, n0, n1).contiguous()

Scales are one an output channel, so joining rows is exact. ``w01`` is one lifted input, in which the weight store keeps
w0 and w1 once. When all readers of the quantised activation merge, it needs no quantise of its own and the whole is one
``int8compile.linear``. The copies make each result a tensor of its own, as the user's code expects (it may reshape
it or write to it); inductor fuses them into what reads them.

Not merged: biases that are computed, or written to, only after the first of the products; int8 weights of the user's
own (an ``Int8Linear``), because the joined one would be a second copy of them.
"""

from __future__ import annotations

import torch
from torch import fx

from int8compile.graph.capture import Lifted
from int8compile.graph.dump import meta_tensor
from int8compile.ops import linear, scaled_mm
from int8compile.passes.analysis import Effects
from int8compile.passes.calls import LinearCall, ScaledMmCall
from int8compile.passes.context import PassContext

aten = torch.ops.aten


def merge(graph: fx.Graph, context: PassContext) -> int:
    groups: dict[object, list[fx.Node]] = {}
    lifted = {pair.weight for pair in context.capture.lifted.values()}
    for node in graph.find_nodes(op="call_function", target=scaled_mm):
        if ScaledMmCall.of(node).weight in lifted:
            groups.setdefault(ScaledMmCall.of(node).activation, []).append(node)
    effects = Effects(graph)
    ready = [[node for node in group if _readable_at(group[0], node, effects)] for group in groups.values()]
    mergeable = [group for group in ready if len(group) > 1]
    for group in mergeable:
        _merge(graph, context, group)
    return sum(map(len, mergeable))


def _readable_at(first: fx.Node, node: fx.Node, effects: Effects) -> bool:
    """Whether all that a product reads is there, and the same, at the first of the products."""
    call = ScaledMmCall.of(node)
    return all(effects.readable_at(read, first, node) for read in (call.x, call.bias) if read is not None)


def _merge(graph: fx.Graph, context: PassContext, group: list[fx.Node]) -> None:
    first, call = group[0], ScaledMmCall.of(group[0])
    lifted_of = {lifted.weight: lifted for lifted in context.capture.lifted.values()}
    lifted = context.capture.lift(tuple(m for node in group for m in lifted_of[ScaledMmCall.of(node).weight].members))
    whole = set(call.codes.users) == set(group)
    product = _product(context, group, lifted, whole)
    start, parts = 0, []
    for node in group:
        value = meta_tensor(node)
        assert value is not None
        rows = value.shape[-1]
        part = context.call(first, aten.narrow.default, (product, -1, start, rows), like=node)
        own = context.call(first, aten.clone.default, (part,), like=node, value=value)
        own.kwargs = {"memory_format": torch.contiguous_format}
        parts.append(own)
        start += rows
    for node, own in zip(group, parts, strict=True):
        context.replace(node, own)
    if whole:
        for unread in (*call.quantized.users, call.quantized):
            graph.erase_node(unread)


def _product(context: PassContext, group: list[fx.Node], lifted: Lifted, whole: bool) -> fx.Node:
    first, call = group[0], ScaledMmCall.of(group[0])
    like, weight = meta_tensor(first), meta_tensor(lifted.weight)
    assert like is not None
    assert weight is not None
    with context.capture.fake_mode:
        value = like.new_empty((*like.shape[:-1], weight.shape[0]))
    bias = _joined_bias(context, group)
    if whole:
        policy = "element" if call.residual_from else "column"
        threshold = LinearCall.threshold_of(call.quantized)
        joined = LinearCall(call.x, lifted.weight, lifted.scale, bias, threshold, policy)
        return context.call(first, linear, tuple(joined), like=first, value=value)
    several = call._replace(weight=lifted.weight, scale=lifted.scale, bias=bias)
    return context.call(first, scaled_mm, tuple(several), like=first, value=value)


def _joined_bias(context: PassContext, group: list[fx.Node]) -> fx.Node | None:
    """The biases end to end, zeros where there is none; None if no one has one."""
    first = group[0]
    biases = [ScaledMmCall.of(node).bias for node in group]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    parts = []
    for node, bias in zip(group, biases, strict=True):
        value = meta_tensor(node)
        assert value is not None
        zeros = (given, [value.shape[-1]])
        parts.append(bias if bias is not None else context.call(first, aten.new_zeros.default, zeros, like=first))
    return context.call(first, aten.cat.default, (parts,), like=first)
