"""fold_queries: attention of one query over grouped heads reads the query heads of a group as rows.

    attention(q [B, H * G, 1, D], k, v [B, H, S, D], enable_gqa=True)
        -> attention(q as [B, H, G, D], k, v) as [B, H * G, 1, D]                     folded
    attention(q [B, H, 1, D], k, v [B, H, S, D])
        -> attention(q as [B, H, 2, D], k, v)[:, :, :1]                               two rows, only where tuned

This is a decoded token. PyTorch's CPU kernel reads a key/value head once for all rows of a query head, and again for
each query head; and a product with a single row is slow. Rows do not see one another, so the results are the same up to
rounding. What it is worth, as ``python -m benchmarks.studies.decode_attention`` prints it: on an Emerald Rapids 1.3 to
1.6 times in float32, 1.8 to 2.7 times in float16 and 0.8 to 1.1 times in bfloat16. On a Zen 5 bfloat16 was found 4 to 6
times as fast when tried by hand, before there was that script.

Left alone: more queries than one; causal masks (which ask what a row's number is); dropout; gradients; GPUs; masks that
are neither the same for all query heads nor one row for each. Left alone, too, unless ``int8compile tune`` has found
otherwise: bfloat16 on Intel's CPUs; CPUs with so many threads that the heads of the queries keep more of them busy than
those of keys do; and a query without groups, which as two equal rows was 1.7 times as fast on the Zen 5, and takes four
times as long on the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.cpuinfo import cpu_says
from int8compile.graph.dump import meta_tensor
from int8compile.native import tuned
from int8compile.passes.analysis import Effects
from int8compile.passes.analysis.attentions import AttentionCall, attention_calls, only_values_matter, plain_sizes
from int8compile.passes.context import PassContext

aten = torch.ops.aten

#: of ``int8compile tune``
TUNABLE = "fold_queries"
#: the forms of an attention of one query
AS_IT_IS, FOLDED, TWO_ROWS = "as it is", "folded", "two rows"


def fold_queries(graph: fx.Graph, context: PassContext) -> int:
    calls = attention_calls(graph, context)
    effects = Effects(graph) if calls else None
    changes = 0
    for call in calls:
        node, given = call
        if effects is None or not only_values_matter(call, effects):
            continue
        groups = _groups(call)
        form = AS_IT_IS if groups is None else _form(node, groups)
        if groups is None or form == AS_IT_IS or not _takes_rows(given["attn_mask"], node):
            continue
        rewritten = _folded(node, given, groups, context) if form == FOLDED else _two_rows(node, given, context)
        context.replace(node, rewritten)
        changes += 1
    return changes


def _groups(call: AttentionCall) -> int | None:
    """How many query heads share a key/value head, one or more; None where this is no attention of one query."""
    sizes = plain_sizes(call)
    if sizes is None or call.given["is_causal"] or not statically_known_true(sizes.queries == 1):
        return None
    return sizes.heads // sizes.kv_heads


def _form(node: fx.Node, groups: int) -> str:
    """What has been measured to be the fastest here, else the default."""
    out = meta_tensor(node)
    assert out is not None
    threads, heads = torch.get_num_threads(), int(out.shape[1])
    found = tuned.choice(TUNABLE, threads=threads, **choice_keys(out.dtype, heads, heads // groups))
    return found if found in forms(groups) else default_form(out.dtype, heads, groups, threads)


def forms(groups: int) -> tuple[str, str]:
    """Those that an attention of one query has, for so many query heads to a key/value head."""
    return (AS_IT_IS, FOLDED if groups > 1 else TWO_ROWS)


def choice_keys(dtype: torch.dtype, heads: int, kv_heads: int) -> dict[str, int | str]:
    """What a tuned choice of the form is looked up by, beside the threads."""
    return {"dtype": str(dtype).removeprefix("torch."), "heads": heads, "kv_heads": kv_heads}


def default_form(dtype: torch.dtype, heads: int, groups: int, threads: int) -> str:
    """Folded where rows are faster, and less work pays for fewer parts: a head each, and up to twice as much work."""
    if groups == 1 or (dtype is torch.bfloat16 and cpu_says("vendor_id") == "GenuineIntel"):
        return AS_IT_IS
    return FOLDED if 2 * -(-heads // groups // threads) <= -(-heads // threads) else AS_IT_IS


def _takes_rows(mask: object, attention: fx.Node) -> bool:
    """Whether a mask says the same for each row, or has one row for each query head."""
    if mask is None:
        return True
    value, out = meta_tensor(mask), meta_tensor(attention)  # type: ignore[arg-type]
    if value is None or out is None:
        return False
    rows = value.shape[-2] if value.dim() > 1 else 1
    heads = value.shape[-3] if value.dim() > 2 else 1
    return statically_known_true(rows == 1) and any(statically_known_true(heads == n) for n in (1, out.shape[1]))


def _folded(node: fx.Node, given: dict[str, Any], groups: int, context: PassContext) -> fx.Node:
    """The attention with the query heads of each group as rows, and its result as it was."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return context.call(node, target, args, like=node, kwargs=kwargs)

    by_group = [-1, groups]
    query, mask = call(aten.unflatten.int, call(aten.squeeze.dim, given["query"], 2), 1, by_group), given["attn_mask"]
    value = None if mask is None else meta_tensor(mask)
    if value is not None and value.dim() > 2 and not statically_known_true(value.shape[-3] == 1):  # one for each head
        mask = call(aten.squeeze.dim, call(aten.unflatten.int, mask, -3, by_group), -2)
    options = {"attn_mask": mask, "scale": given["scale"]}
    attended = call(node.target, query, given["key"], given["value"], **options)
    return call(aten.unsqueeze.default, call(aten.flatten.using_ints, attended, 1, 2), 2)


def _two_rows(node: fx.Node, given: dict[str, Any], context: PassContext) -> fx.Node:
    """The attention of the query given twice, of which one result is kept. Its mask has one row, which is for both."""
    target: Any = node.target
    query = context.call(node, aten.expand.default, (given["query"], [-1, -1, 2, -1]), like=node)
    options = {"attn_mask": given["attn_mask"], "scale": given["scale"]}
    attended = context.call(node, target, (query, given["key"], given["value"]), like=node, kwargs=options)
    return context.call(node, aten.narrow.default, (attended, 2, 0, 1), like=node)
