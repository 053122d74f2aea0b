"""Int8 linears that read one activation, which ``merge`` joins and ``share`` quantises once for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from int8compile.graph.dump import meta_tensor
from int8compile.ops import linear
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.effects import Effects
from int8compile.passes.analysis.regions import regions
from int8compile.passes.context import PassContext


class LinearCall(NamedTuple):
    """``int8compile.linear(x, weight, weight_scale, bias, threshold, outlier_policy, columns, column_weight)``"""

    x: fx.Node
    weight: fx.Node
    weight_scale: fx.Node
    bias: fx.Node | None
    threshold: float
    outlier_policy: str
    columns: fx.Node | None = None
    column_weight: fx.Node | None = None

    @classmethod
    def of(cls, node: fx.Node) -> LinearCall:
        given = arguments(node)
        return cls(*(given[name] for name in cls._fields))

    def args(self) -> tuple[Any, ...]:
        """Those of a call, without columns where there are none."""
        return tuple(self if self.columns is not None else self[:-2])


def readers(graph: fx.Graph, context: PassContext, effects: Effects) -> list[list[fx.Node]]:
    """Runs of two or more linears, in graph order, that can read one quantised activation at the first of them.

    They read the same values of the same x under one threshold and outlier policy, with the same columns if these are
    given, give one dtype, and stand in one autocast and gradient region.
    """
    columns_of = {lifted.weight: lifted.columns for lifted in context.capture.lifted.values()}
    where = regions(graph, context.grad_enabled)
    runs_of: dict[object, list[list[fx.Node]]] = {}
    for node in graph.find_nodes(op="call_function", target=linear):
        if not node.users or arguments(node)["columns"] is not None:  # the user's own: unread, or with columns given
            continue
        call, out = LinearCall.of(node), meta_tensor(node)
        columns = columns_of.get(call.weight, call.columns)
        dtype = None if out is None else out.dtype
        key = (call.x, call.threshold, call.outlier_policy, columns or None, dtype, where[node])
        runs = runs_of.setdefault(key, [])
        if runs and effects.readable_at(call.x, runs[-1][0], node):
            runs[-1].append(node)
        else:
            runs.append([node])
    return [run for runs in runs_of.values() for run in runs if len(run) > 1]
