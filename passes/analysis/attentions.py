"""The calls of PyTorch's attention in a graph that a pass may put into another form: on CPUs, without gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.graph.dump import meta_tensor
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.effects import Effects
from int8compile.passes.analysis.regions import regions, transformed
from int8compile.passes.context import PassContext

#: the calls of PyTorch's attention
ATTENTION = {
    torch.nn.functional.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
}


class AttentionCall(NamedTuple):
    """A call and its arguments by name: query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa."""

    node: fx.Node
    given: dict[str, Any]


class Sizes(NamedTuple):
    """Of query [B, H, M, D], key [B, Hkv, N, D] and value [B, Hkv, N, Dv]. H and Hkv are numbers."""

    batch: int | torch.SymInt
    heads: int
    kv_heads: int
    queries: int | torch.SymInt
    keys: int | torch.SymInt
    width: int | torch.SymInt


def attention_calls(graph: fx.Graph, context: PassContext) -> list[AttentionCall]:
    """On CPU tensors, where no gradient is recorded and no transform of ``torch.func`` is at work."""
    where, left = regions(graph, context.grad_enabled), transformed(graph)
    found = []
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in ATTENTION or where[node][1] or node in left:
            continue
        value, given = meta_tensor(node), arguments(node)
        if value is not None and value.device.type == "cpu" and given:
            found.append(AttentionCall(node, given))
    return found


def only_values_matter(call: AttentionCall, effects: Effects) -> bool:
    """Whether something reads the result, and no operand nor the result is given another shape in place."""
    return bool(call.node.users) and not any(map(effects.reshaped, [call.node, *call.node.all_input_nodes]))


def plain_sizes(call: AttentionCall) -> Sizes | None:
    """The sizes of a call without dropout in which nothing is broadcast but the heads of groups; else None."""
    tensors = [meta_tensor(call.given[name]) for name in ("query", "key", "value")]
    if any(t is None or t.dim() != 4 for t in tensors) or call.given["dropout_p"] != 0:
        return None
    query, key, value = (t.shape for t in tensors if t is not None)
    heads, kv_heads = query[1], key[1]
    if not (isinstance(heads, int) and isinstance(kv_heads, int) and value[1] == kv_heads and 0 < kv_heads <= heads):
        return None
    if heads != kv_heads and not (call.given["enable_gqa"] and heads % kv_heads == 0):
        return None
    # (Keys are as many as values, or the call raises; under symbolic sizes nobody need have compared them yet.)
    same = ((query[0], key[0]), (query[0], value[0]), (query[3], key[3]))
    if statically_known_true(key[2] != value[2]) or not all(statically_known_true(a == b) for a, b in same):
        return None
    return Sizes(query[0], heads, kv_heads, query[2], key[2], query[3])
