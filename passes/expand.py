"""expand: PyTorch's fused attention calls become the operations they stand for, so that the linears in them are sites.

    (a) F.multi_head_attention_forward(q, k, v, ...)   -> its own Python body (nn.MultiheadAttention)
    (b) torch._native_multi_head_attention(...)        -> the same, for tensors that begin with the batch
    (c) torch._transformer_encoder_layer_fwd(...)      -> attention, feed-forward and norms (nn.TransformerEncoderLayer)

No numerics change beyond rounding. Left as they are: calls on nested tensors (padding taken out on the fly), calls
whose results are read otherwise than one by one, calls of which nothing reads the attention's or the layer's output.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from int8compile.graph.dump import meta_value
from int8compile.passes.analysis import transformed
from int8compile.passes.analysis.fused import FUSED
from int8compile.passes.context import PassContext


def expand(graph: fx.Graph, context: PassContext) -> int:
    changes = 0
    left = transformed(graph)
    for target, body in FUSED.items():
        for node in graph.find_nodes(op="call_function", target=target):
            traced = None if node in left else _trace(node, body, context)
            if traced is not None:
                _inline(node, *traced, context)
                changes += 1
    return changes


def _trace(node: fx.Node, body: Callable[..., Any], context: PassContext) -> tuple[fx.Graph, list[fx.Node]] | None:
    """The body as a graph, and the nodes that its inputs are; None where it has to stay as it is."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = list(dict.fromkeys(a for a in flat if isinstance(a, fx.Node)))
    values = [meta_value(a) for a in inputs]
    if not all(isinstance(v, torch.Tensor) and not v.is_nested for v in values):
        return None
    if not _is_read(node):
        return None

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([given[a] if isinstance(a, fx.Node) else a for a in flat], spec)
        return body(*args, **kwargs)

    with context.capture.fake_mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*values)
    if traced.graph.find_nodes(op="get_attr"):
        return None
    return traced.graph, inputs


def _is_read(node: fx.Node) -> bool:
    """Whether the first of a call's results is read, and all by their place."""
    if not isinstance(meta_value(node), (tuple, list)):
        return bool(node.users)
    by_place = all(user.target is operator.getitem for user in node.users)
    return by_place and any(user.users for user in node.users if user.args[1] == 0)


def _inline(node: fx.Node, body: fx.Graph, inputs: list[fx.Node], context: PassContext) -> None:
    """Put a traced body in a call's place."""
    new: dict[fx.Node, fx.Node] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    result: Any = None
    for inner in body.nodes:
        if inner.op == "output":
            result = fx.node.map_arg(inner.args[0], new.__getitem__)
        elif inner.op != "placeholder":
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), new.__getitem__)  # type: ignore[misc]
            assert not kwargs or isinstance(kwargs, dict)
            new[inner] = context.call(node, inner.target, args, like=node, value=inner.meta["val"], kwargs=kwargs)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
