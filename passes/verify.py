"""verify: the rewritten graph obeys our rules. A breach is our bug and raises VerifyError with the graph's text.

The rules: every int8 call agrees with its operator's fake in shape and dtype; int8 weights and scales are lifted inputs
with the right dtypes; no float weight is left that only a rewritten site used; no lifted input is unused; nothing we
inserted is dead.
"""

from __future__ import annotations

from torch import fx

from int8compile.capture import is_constant
from int8compile.errors import VerifyError
from int8compile.graph_text import dump, meta_tensor, meta_value, target_name
from int8compile.ops import linear, quantize_rowwise, scaled_mm
from int8compile.passes.context import PassContext

_WEIGHT_AT = {linear: 1, scaled_mm: 4}


def verify(graph: fx.Graph, context: PassContext) -> int:
    for node in graph.nodes:
        if node.target in (linear, scaled_mm, quantize_rowwise):
            _check_call(graph, context, node)
    _check_inputs(graph, context)
    return 0


def _fail(graph: fx.Graph, problem: str) -> None:
    raise VerifyError(problem, dump(graph))


def _check_call(graph: fx.Graph, context: PassContext, node: fx.Node) -> None:
    if not node.users:
        _fail(graph, f"{node.name} ({target_name(node.target)}) is dead")
    args = fx.node.map_arg(node.args, meta_value)
    with context.capture.fake_mode:
        expected = node.target(*args)  # type: ignore[operator]
    value = meta_value(node)
    pairs = [(expected, value)] if node.target is not quantize_rowwise else list(zip(expected, value, strict=True))  # type: ignore[call-overload]
    for want, have in pairs:
        # Under autocast the operator's dtype is that of the region, which the fake call above does not see.
        if tuple(want.shape) != tuple(have.shape):
            _fail(graph, f"{node.name} is {have.dtype}{list(have.shape)} where its operator gives {list(want.shape)}")
    if node.target in _WEIGHT_AT:
        weight = node.args[_WEIGHT_AT[node.target]]  # type: ignore[index]
        scale = node.args[_WEIGHT_AT[node.target] + 1]  # type: ignore[index]
        if not any(lifted.weight is weight and lifted.scale is scale for lifted in context.capture.lifted.values()):
            _fail(graph, f"{node.name} reads a weight and scale that are not a lifted pair")
        if (out := meta_tensor(node)) is None or not out.is_floating_point():
            _fail(graph, f"{node.name} has no floating-point value")


def _check_inputs(graph: fx.Graph, context: PassContext) -> None:
    placeholders = set(graph.find_nodes(op="placeholder"))
    for lifted in context.capture.lifted.values():
        if not lifted.weight.users or not lifted.scale.users:
            _fail(graph, f"lifted input {lifted.weight.name} is not read")
        for member, _ in lifted.members:
            if member in placeholders and not member.users and is_constant(member):
                _fail(graph, f"float weight {member.name} is left behind its rewritten site")
