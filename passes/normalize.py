"""normalize: every form of a linear becomes ``aten.linear(x, weight, bias)``. No numerics change.

    (a) F.linear(x, w, b)                               -> aten.linear(x, w, b)
    (b) x @ w.t(), matmul, mm; w.T, transpose, permute  -> aten.linear(x, w, None)
    (c) x @ w with w [K, N]                             -> aten.linear(x, aten.t(w), None)
    (d) addmm(b, x, w) with w [K, N] (GPT-2's Conv1D)   -> aten.linear(x, aten.t(w), b)
    (e) einsum("...k,nk->...n", x, w) and its like      -> aten.linear(x, w or aten.t(w), None)
    (f) aten.linear, mm, addmm, matmul of an exported graph, the same way
    (g) int8compile.linear, the user's own              -> the same, with all its arguments positional

A matmul is a linear only if its second operand (of an einsum, either) is, through transposes, a parameter or buffer:
attention's ``q @ k.T`` stays. Left too: einsums that permute their result or broadcast features. Left with a Reason:
``out=``, addmm with alpha or beta, or with a bias that is not [N], and a product that nothing reads.
"""

from __future__ import annotations

import torch
from torch import fx

from int8compile.graph.dump import meta_value
from int8compile.ops import linear as int8_linear
from int8compile.passes.analysis import transformed
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.linears import match_linear
from int8compile.passes.analysis.sites import make_site
from int8compile.passes.context import PassContext
from int8compile.report import Reason

aten = torch.ops.aten

LINEAR = aten.linear.default

_INT8 = {int8_linear, torch.ops.int8compile.linear}


def normalize(graph: fx.Graph, context: PassContext) -> int:
    left = transformed(graph)  # our operators have no rules for these transforms
    changes = 0
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _INT8:
            changes += _spell_out(node, context)
        elif node not in left:
            changes += _normalize(node, context)
    return changes


def _spell_out(node: fx.Node, context: PassContext) -> bool:
    """Give a call of ``int8compile.linear`` all its arguments, in order."""
    args = tuple(arguments(node).values())
    if node.target is int8_linear and args == node.args:
        return False
    context.replace(node, context.call(node, int8_linear, args, like=node, value=meta_value(node)))
    return True


def _normalize(node: fx.Node, context: PassContext) -> bool:
    if node.op == "call_function" and node.target is LINEAR and not node.kwargs and len(node.args) == 3:
        return False
    linear = match_linear(node)
    if linear is None:
        return False
    if linear.beside or not node.users:
        reason = Reason.FORM if linear.beside else Reason.UNREAD
        context.sites[node] = make_site(node, linear.weight, reason, linear.beside, transposed=linear.transposed)
        return False
    weight = linear.weight
    if linear.transposed:
        weight = context.call(node, aten.t.default, (weight,), like=node)
    args = (linear.x, weight, linear.bias)
    context.replace(node, context.call(node, LINEAR, args, like=node, value=meta_value(node)))
    return True
