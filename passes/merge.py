"""merge: int8 linears that read one activation become one product, its result split.

    y0 = int8compile.linear(x, w0, s0, b0, t, p)         y = int8compile.linear(x, w01, s01, cat(b0, b1), t, p)
    y1 = int8compile.linear(x, w1, s1, b1, t, p)    ->   y0 = narrow(y, 0, n0).contiguous()
                                                         y1 = narrow(y, n0, n1).contiguous()

Scales are one an output channel, so joining rows is exact. ``w01`` is one lifted input, in which the weight store keeps
w0 and w1 once. The copies make each result a tensor of its own, as the user's code expects (it may reshape it or write
to it); inductor fuses them into what reads them.

Not merged, and left for ``share``: biases that are computed, or written to, only after the first of the products; int8
weights of the user's own (an ``Int8Linear``), because the joined one would be a second copy of them; rows of a weight;
a weight that is in the product already.
"""

from __future__ import annotations

import torch
from torch import fx

from int8compile.graph.capture import LiftedWeight
from int8compile.graph.dump import meta_tensor
from int8compile.ops import linear
from int8compile.passes.analysis import Effects
from int8compile.passes.analysis.readers import LinearCall, readers
from int8compile.passes.context import PassContext

aten = torch.ops.aten


def merge(graph: fx.Graph, context: PassContext) -> int:
    effects = context.effects()
    lifted_of = {lifted.weight: lifted for lifted in context.capture.lifted.values()}
    runs = [_joinable(run, lifted_of, effects) for run in readers(graph, context, effects)]
    runs = [run for run in runs if len(run) > 1]
    for run in runs:
        _merge(context, run, lifted_of)
    return sum(map(len, runs))


def _joinable(run: list[fx.Node], lifted_of: dict[fx.Node, LiftedWeight], effects: Effects) -> list[fx.Node]:
    """Those of a run with lifted weights, each once, whose biases are there, and the same, at the first of them."""
    first_with: dict[fx.Node, fx.Node] = {}
    for node in run:
        if LinearCall.of(node).weight in lifted_of:
            first_with.setdefault(LinearCall.of(node).weight, node)
    lifted = list(first_with.values())
    biases = [(node, LinearCall.of(node).bias) for node in lifted]
    return [node for node, bias in biases if bias is None or effects.readable_at(bias, lifted[0], node)]


def _merge(context: PassContext, run: list[fx.Node], lifted_of: dict[fx.Node, LiftedWeight]) -> None:
    first, call = run[0], LinearCall.of(run[0])
    values = [value for node in run if (value := meta_tensor(node)) is not None]
    sizes = [int(value.shape[-1]) for value in values]
    sources = tuple(s for node in run for s in lifted_of[LinearCall.of(node).weight].sources)
    lifted = context.capture.lift(sources, lifted_of[call.weight].columns)
    columns, column_weight = lifted.column_inputs or (None, None)
    bias = _joined_bias(context, run, sizes)
    joined = LinearCall(
        call.x, lifted.weight, lifted.weight_scale, bias, call.threshold, call.outlier_policy, columns, column_weight
    )
    with context.capture.fake_mode:
        whole = values[0].new_empty((*values[0].shape[:-1], sum(sizes)))
    product = context.call(first, linear, joined.args(), like=first, value=whole)
    start, parts = 0, []
    for node, value, size in zip(run, values, sizes, strict=True):
        part = context.call(first, aten.narrow.default, (product, -1, start, size), like=node)
        kwargs = {"memory_format": torch.contiguous_format}
        parts.append(context.call(first, aten.clone.default, (part,), like=node, value=value, kwargs=kwargs))
        start += size
    for node, part in zip(run, parts, strict=True):
        context.replace(node, part)


def _joined_bias(context: PassContext, run: list[fx.Node], sizes: list[int]) -> fx.Node | None:
    """The biases end to end, zeros where there is none; None if no one has one."""
    first = run[0]
    biases = [LinearCall.of(node).bias for node in run]
    given = next((bias for bias in biases if bias is not None), None)
    if given is None:
        return None
    parts = [
        bias if bias is not None else context.call(first, aten.new_zeros.default, (given, [size]), like=first)
        for bias, size in zip(biases, sizes, strict=True)
    ]
    return context.call(first, aten.cat.default, (parts,), like=first)
