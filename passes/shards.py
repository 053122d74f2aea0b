"""Puts a product of this process's shards in the place of one of DTensors, for ``quantize``.

    aten.linear(x, w, b)   ->   y = int8compile.linear(x.to_local(), w_int8, w_scale, b.to_local(), t, p)
                                DTensor.from_local(y, x.device_mesh, placements)

``w_int8`` is made of the shard of ``w``. Of ``x = DTensor.from_local(h, ...)`` the product reads h itself. Row-wise
each process adds its part of the bias: 1 / n of it, as DTensor's own product does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from int8compile.graph.capture import constant_of, is_constant
from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import linear as int8_linear
from int8compile.passes.analysis import regions
from int8compile.passes.analysis.shards import Shards
from int8compile.passes.context import PassContext
from int8compile.torch_internals.dtensors import changes_layout, from_local, local_of, makes_dtensor, takes_shard


def replace_by_shards(
    node: fx.Node, shards: Shards, lifted: tuple[fx.Node, fx.Node], outliers: tuple[float, str], context: PassContext
) -> None:
    """Put a product of this process's shards in the place of one of DTensors."""
    x, _, bias = node.args
    out = meta_value(node)
    assert isinstance(x, fx.Node)
    assert isinstance(out, torch.Tensor)
    layout: Any = out  # a DTensor
    mesh = context.call(node, getattr, (x, "device_mesh"), like=node, value=layout.device_mesh)
    x = _shard_of(x, node, context)
    if isinstance(bias, fx.Node):
        bias = _shard_of(bias, node, context)
        if shards.summands > 1:
            bias = context.call(node, torch.ops.aten.div.Tensor, (bias, shards.summands), like=node)
    product = context.call(node, int8_linear, (x, *lifted, bias, *outliers), like=node, value=local_of(out))
    args = (product, mesh, tuple(layout.placements))
    context.replace(node, context.call(node, from_local(), args, like=node, value=out, kwargs={"run_check": False}))


def _shard_of(node: fx.Node, before: fx.Node, context: PassContext) -> fx.Node:
    if makes_dtensor(node) and changes_layout(node) and node.args:
        local = node.args[0]
        assert isinstance(local, fx.Node)
        return local
    value = meta_tensor(node)
    assert value is not None
    if is_constant(node):
        before = next(n for n in node.graph.nodes if n.op != "placeholder")
    return context.call_method(before, "to_local", (node,), like=before, value=local_of(value))


def read_shards_first(graph: fx.Graph, context: PassContext) -> None:
    """Move ``w.to_local()`` of constants, which are views, to the front, where ``merge`` can read the biases."""
    where = regions(graph, context.grad_enabled)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        if takes_shard(node) and constant_of(node) is not None and where[node] == where[first] and node is not first:
            first.prepend(node)
