"""attend: attention becomes int8compile's own, which leaves out what a mask hides and reads a group's keys once.

    attention(q [B, H, M, D], k, v [B, Hkv, N, D], mask, scale, is_causal) -> int8compile.attention(q, k, v, mask, ...)

PyTorch's CPU kernel multiplies a mask's hidden keys like all others; of a prompt they are half. See
``csrc/cpu/attention.h`` for what bounds it and ``int8compile/native/attention.py`` for where it is faster, which is
where this pass replaces a call. The results are the same up to rounding; the result's layout in memory is as it was.

Left alone: what is not measured to be faster, and CPUs with so many threads that the heads of the queries keep more of
them busy than those of keys do (both unless ``attention="native"``); ``attention="torch"``; graphs that the
native CPU kernels do not compute; dropout; gradients and transforms of ``torch.func``; GPUs; operands of several dtypes
(as under autocast); masks of another dtype or number of dimensions; a mask besides ``is_causal``; broadcast
batches and heads; a head's width that is not a number; and programs for export, which may run on another CPU.
"""

from __future__ import annotations

import numbers

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from int8compile.graph.dump import meta_tensor
from int8compile.limits import FLOAT_DTYPES
from int8compile.native import tuned
from int8compile.native.attention import is_faster
from int8compile.ops import attention
from int8compile.passes.analysis import Effects
from int8compile.passes.analysis.attentions import (
    AttentionCall,
    Sizes,
    attention_calls,
    only_values_matter,
    plain_sizes,
)
from int8compile.passes.context import PassContext

aten = torch.ops.aten

#: of ``int8compile tune``
TUNABLE = "attend"
#: who computes an attention of many queries
NATIVE, TORCH = "native", "torch"

_MANY = 1 << 15  # blocks of queries: sizes that are no numbers are a prompt's


def attend(graph: fx.Graph, context: PassContext) -> int:
    if not context.native_cpu or context.config.attention == "torch":
        return 0
    calls = attention_calls(graph, context)
    effects = Effects(graph) if calls else None
    changes = 0
    for call in calls:
        sizes = plain_sizes(call)
        if effects is None or sizes is None or not only_values_matter(call, effects):
            continue
        if _is_served(call, sizes) and (context.config.attention == "native" or _is_faster(call, sizes)):
            changes += _replace(call, sizes, context)
    return changes


def _is_served(call: AttentionCall, sizes: Sizes) -> bool:
    """Whether the operator takes the operands, and computes the same of them."""
    given, out = call.given, meta_tensor(call.node)
    values = [out, *(meta_tensor(given[name]) for name in ("query", "key", "value"))]
    dtypes = {value.dtype for value in values if value is not None}
    if len(dtypes) != 1 or not dtypes.issubset(FLOAT_DTYPES):
        return False
    plain = all(
        type(value) is type(out) and value.device == out.device
        for value in values
        if out is not None and value is not None
    )
    if not plain or not isinstance(sizes.width, int) or sizes.width == 0 or not isinstance(given["is_causal"], bool):
        return False
    if given["scale"] is not None and not isinstance(given["scale"], numbers.Real):
        return False
    return given["attn_mask"] is None or (not given["is_causal"] and _is_mask(given["attn_mask"], dtypes.pop(), sizes))


def _is_mask(node: object, dtype: torch.dtype, sizes: Sizes) -> bool:
    """Whether a mask is one that the operator takes; asks for a guard where its sizes are symbols of their own."""
    mask = meta_tensor(node) if isinstance(node, fx.Node) else None
    if mask is None or mask.dtype not in (torch.bool, dtype) or mask.device.type != "cpu" or not 2 <= mask.dim() <= 4:
        return False
    whole = (sizes.batch, sizes.heads, sizes.queries, sizes.keys)
    pairs = zip(mask.shape[::-1], whole[::-1], strict=False)
    return all(statically_known_true(m == 1) or guard_or_false(m == n) for m, n in pairs)


def _is_faster(call: AttentionCall, sizes: Sizes) -> bool:
    """By what has been measured on this machine, else by the default."""
    out = meta_tensor(call.node)
    assert out is not None
    masked = call.given["attn_mask"] is not None or call.given["is_causal"]
    one = statically_known_true(sizes.queries == 1)
    kind = "one query" if one else "masked" if masked else "whole"
    threads = torch.get_num_threads()
    keys = choice_keys(out.dtype, kind, sizes.heads, sizes.kv_heads, int(sizes.width))
    found = tuned.choice(TUNABLE, threads=threads, **keys)
    if found in (NATIVE, TORCH):
        return found == NATIVE
    batch, queries = sizes.batch, sizes.queries
    blocks = batch * query_blocks(queries) if isinstance(batch, int) and isinstance(queries, int) else _MANY
    return default_form(out.dtype, kind, sizes.heads, sizes.kv_heads, blocks, threads) == NATIVE


def query_blocks(queries: int) -> int:
    """What the threads share out, of each batch and key/value head."""
    return -(-queries // 32)


def choice_keys(dtype: torch.dtype, kind: str, heads: int, kv_heads: int, width: int) -> dict[str, int | str]:
    """What a tuned choice is looked up by, beside the threads."""
    name = str(dtype).removeprefix("torch.")
    return {"dtype": name, "kind": kind, "heads": heads, "kv_heads": kv_heads, "width": width}


def default_form(dtype: torch.dtype, kind: str, heads: int, kv_heads: int, blocks: int, threads: int) -> str:
    """Ours where it is faster, and threads get about as even a share as PyTorch's, which takes each head by itself.

    Ours takes the heads of a group together, which is less work, but fewer parts.

    Args:
        blocks: of queries, of the whole batch.
    """
    rounds, theirs = -(-kv_heads * blocks // threads), -(-heads * blocks // threads)
    even = 4 * rounds * (heads // kv_heads) <= 5 * theirs
    return NATIVE if is_faster(dtype, kind) and even else TORCH


def _replace(call: AttentionCall, sizes: Sizes, context: PassContext) -> bool:
    """Put the operator in a call's place, unless the result would lie in memory in another way."""
    node, given = call
    before = meta_tensor(node)
    scale = float(sizes.width) ** -0.5 if given["scale"] is None else float(given["scale"])
    args = (given["query"], given["key"], given["value"], given["attn_mask"], scale, given["is_causal"])
    new = context.call(node, attention, args, like=node)
    made = [new]
    if not _lie_alike(meta_tensor(new), before):
        contiguous = {"memory_format": torch.contiguous_format}
        made.append(context.call(node, aten.clone.default, (new,), like=node, kwargs=contiguous))
    if not _lie_alike(meta_tensor(made[-1]), before):
        for attempt in reversed(made):
            attempt.graph.erase_node(attempt)
        return False
    context.replace(node, made[-1])
    return True


def _lie_alike(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Whether two tensors have equal strides, those of dimensions of one element aside."""
    if a is None or b is None:
        return False
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(statically_known_true(s == t) or statically_known_true(n == 1) for n, s, t in strides)
