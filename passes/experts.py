"""experts: products with a weight that holds several experts' matrices become ``int8compile.grouped_linear``.

    (a) torch._grouped_mm(x, w.transpose(-2, -1), offs)   -> grouped_linear(x, w_int8, w_scale, offs, ...)
        F.grouped_mm, and transformers' grouped_mm_fallback; w [E, N, K], or w [E, K, N] without the transpose
    (b) bmm(w[ids], x[:, :, None])                        -> grouped_linear(x[order], w_int8, w_scale, ends, ...)[back]
        bmm(x[:, None], w[ids]) with w [E, K, N]; matmul      where ``order`` sorts ids [S] by expert
    (c) bmm(x [E, M, K], w [E, K, N]), or w.mT            -> grouped_linear(x [E * M, K], w_int8, w_scale, ends, ...)

(b) reads each expert that is wanted once; gathering would copy an int8 matrix for each row. What stays float has a
Reason: grouped products with a bias or of another dtype, several rows for each of ``ids``, all experts for each row,
einsum.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from int8compile import selection
from int8compile.graph.capture import FloatInput, constant_of
from int8compile.graph.dump import meta_tensor, meta_value
from int8compile.ops import grouped_linear
from int8compile.passes.analysis import transformed
from int8compile.passes.analysis.experts import Experts, Gather, match_experts
from int8compile.passes.analysis.sites import prequantized_site
from int8compile.passes.context import PassContext
from int8compile.passes.quantize import Facts

aten = torch.ops.aten


def experts(graph: fx.Graph, context: PassContext) -> int:
    for node in graph.find_nodes(op="call_function", target=grouped_linear):
        context.sites[node] = prequantized_site(node)
    left = transformed(graph)
    found = [(node, match) for node in graph.nodes if node not in left and (match := match_experts(node)) is not None]
    facts = Facts(graph, context) if found else None
    changes = 0
    for node, match in found:
        assert facts is not None
        site = context.sites[node] = facts.decide_experts(node, match)
        if site.rewritten:
            context.replace(node, _rewritten(node, match, site.path, context))
            changes += 1
    return changes


def _rewritten(node: fx.Node, match: Experts, path: str, context: PassContext) -> fx.Node:
    constant = constant_of(match.weight)
    assert constant is not None
    lifted = context.capture.lift((FloatInput(constant, match.transposed),))

    def product(x: fx.Node, offsets: fx.Node, value: Any = None) -> fx.Node:
        weights = (lifted.weight, lifted.weight_scale)
        args = (x, *weights, offsets, None, *selection.outliers(context.config, path))
        return context.call(node, grouped_linear, args, like=node, value=value)

    if match.gather is not None:
        return _sorted(node, match, match.gather, product, context)
    if match.offsets is None:
        return _batched(node, match, product, context)
    offsets, ends = match.offsets, meta_tensor(match.offsets)
    if ends is not None and ends.dtype is not torch.int32:
        offsets = context.call(node, aten.to.dtype, (offsets, torch.int32), like=node)
    return product(match.x, offsets, meta_value(node))


def _sorted(node: fx.Node, match: Experts, gather: Gather, product: Any, context: PassContext) -> fx.Node:
    """(b): rows by expert, multiplied, and put back."""
    weight, ids = meta_tensor(match.weight), meta_tensor(gather.ids)
    assert weight is not None
    assert ids is not None

    def call(before: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return context.call(before, target, args, like=node, kwargs=kwargs)

    # The indices where they are gathered by: they may be written to before the product.
    numbers = call(gather.node, aten.arange.default, weight.shape[0], dtype=torch.int64, device=ids.device)
    chosen = call(gather.node, aten.index.Tensor, numbers, [gather.ids])  # counts from the end, refuses, as w[ids] does
    by_expert = call(gather.node, aten.sort.default, chosen)
    values, order = (call(gather.node, operator.getitem, by_expert, i) for i in (0, 1))
    ends = call(gather.node, aten.searchsorted.Tensor, values, numbers, out_int32=True, right=True)
    back = call(gather.node, aten.argsort.default, order)

    x = call(node, aten.index.Tensor, call(node, aten.squeeze.dim, match.x, match.one), [order])
    return call(node, aten.unsqueeze.default, call(node, aten.index.Tensor, product(x, ends), [back]), match.one)


def _batched(node: fx.Node, match: Experts, product: Any, context: PassContext) -> fx.Node:
    """(c): as many rows for each expert."""
    weight, x = meta_tensor(match.weight), meta_tensor(match.x)
    assert weight is not None
    assert x is not None

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return context.call(node, target, args, like=node, kwargs=kwargs)

    experts = int(weight.shape[0])
    rows = x.shape[1] if isinstance(x.shape[1], int) else call(aten.sym_size.int, match.x, 1)
    numbers = call(aten.arange.start, 1, experts + 1, dtype=torch.int32, device=x.device)
    product_of_rows = product(call(aten.flatten.using_ints, match.x, 0, 1), call(aten.mul.Tensor, numbers, rows))
    return call(aten.unflatten.int, product_of_rows, 0, [experts, -1])
