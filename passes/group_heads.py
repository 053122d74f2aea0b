"""group_heads: attention reads each key/value head once, not a copy of it for each of the query heads that share it.

    k, v [B, H, S, D] -> unsqueeze, expand [B, H, G, S, D], reshape [B, H * G, S, D]      attention(q, k, v, ...,
    attention(q, copy of k, copy of v, ...)                                          ->             enable_gqa=True)

Grouped-query attention (Ainslie et al., 2023) as transformers writes it, whose copies of a key/value cache cost a
decode step more than its attention does. The results are equal to the bit. Only where PyTorch's own kernel takes
grouped heads and nothing is lost: on CPUs, without gradients. (On GPUs a mask sends such a call to a slow kernel.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.passes.analysis import Effects
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.attentions import attention_calls
from int8compile.passes.context import PassContext

aten = torch.ops.aten

_RESHAPE = {"reshape", "view", torch.reshape, aten.reshape.default, aten.view.default}
_EXPAND = {"expand", aten.expand.default}


class _Copies(NamedTuple):
    """``reshaped`` holds each head of ``heads`` [B, H, 1, S, D] G times in a row."""

    heads: fx.Node
    reshaped: fx.Node


def group_heads(graph: fx.Graph, context: PassContext) -> int:
    found = []
    for node, given in attention_calls(graph, context):
        copies = [c for c in (_copies(given["key"]), _copies(given["value"])) if c]
        if len(copies) == 2 and not given["enable_gqa"]:
            found.append((node, copies))
    effects = context.effects() if found else None
    found = [(node, copies) for node, copies in found if effects and all(_same(c, node, effects) for c in copies)]
    for node, copies in found:
        _group(node, copies, context)
    return len(found)


def _same(copies: _Copies, attention: fx.Node, effects: Effects) -> bool:
    """Whether the heads are at the attention what they were when copied, and the copies too."""
    nodes = (copies.heads, copies.reshaped)
    return not any(effects.reshaped(n) or effects.changes(n, copies.reshaped, attention) for n in nodes)


def _copies(node: object) -> _Copies | None:
    """What a node is a copy of, if it is made of the heads of a smaller tensor, each several times."""
    if not isinstance(node, fx.Node) or node.target not in _RESHAPE:
        return None
    expanded = node.args[0]
    if not isinstance(expanded, fx.Node) or expanded.target not in _EXPAND:
        return None
    heads = expanded.args[0]
    if not isinstance(heads, fx.Node):
        return None
    whole, wide, narrow = meta_tensor(node), meta_tensor(expanded), meta_tensor(heads)
    if whole is None or wide is None or narrow is None or (whole.dim(), wide.dim(), narrow.dim()) != (4, 5, 5):
        return None
    b, h, g, s, d = wide.shape
    same = [*zip(whole.shape, (b, h * g, s, d), strict=True), *zip(narrow.shape, (b, h, 1, s, d), strict=True)]
    return _Copies(heads, node) if all(statically_known_true(m == n) for m, n in same) else None


def _group(node: fx.Node, copies: list[_Copies], context: PassContext) -> None:
    key, value = (context.call(node, aten.squeeze.dim, (c.heads, 2), like=c.reshaped) for c in copies)
    query, _, _, *rest = arguments(node).items()
    args, kwargs = (query[1], key, value), {**dict(rest), "enable_gqa": True}
    assert not isinstance(node.target, str)
    new = context.call(node, node.target, args, like=node, value=meta_value(node), kwargs=kwargs)
    context.replace(node, new)
