"""Int8 linears that read one activation, which ``merge`` joins and ``share`` quantises once for."""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from int8compile.graph.dump import meta_tensor
from int8compile.ops import linear
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.effects import Effects
from int8compile.passes.analysis.regions import regions
from int8compile.passes.context import PassContext


class LinearCall(NamedTuple):
    """``int8compile.linear(x, weight, weight_scale, bias, threshold, outlier_policy)``"""

    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    threshold: float
    outlier_policy: str

    @classmethod
    def of(cls, node: fx.Node) -> LinearCall:
        return cls(**arguments(node))


def readers(graph: fx.Graph, context: PassContext, effects: Effects) -> list[list[fx.Node]]:
    """Runs of two or more linears, in graph order, that can read one quantised activation at the first of them.

    They read the same values of the same x under one threshold and outlier policy, give one dtype, and stand in one
    autocast and gradient region.
    """
    where = regions(graph, context.grad_enabled)
    runs_of: dict[object, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        if not node.users:  # the user's own, which nobody reads
            continue
        call, out = LinearCall.of(node), meta_tensor(node)
        key = (call.x, call.threshold, call.outlier_policy, None if out is None else out.dtype, where[node])
        runs = runs_of.setdefault(key, [])
        if runs and effects.readable_at(call.x, runs[-1][0], node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return [run for runs in runs_of.values() for run in runs if len(run) > 1]
