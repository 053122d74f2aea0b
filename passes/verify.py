"""verify: checks the rewritten graph. A breach is a bug of a pass and raises VerifyError with the graph's text.

The rules: every int8 call agrees with its operator's fake in shape and dtype; lifted int8 weights are read with their
own scales; no float weight is left that only a rewritten site used; no lifted input is unused; no int8 call is dead but
those of the user's own that nothing read.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.errors import VerifyError
from int8compile.graph.capture import is_constant
from int8compile.graph.dump import dump, meta_tensor, meta_value, target_name
from int8compile.limits import FLOAT_DTYPES
from int8compile.ops import grouped_linear, linear, master_linear, quantize_rowwise, scaled_mm
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.context import PassContext, argument_values


def verify(graph: fx.Graph, context: PassContext) -> int:
    for node in graph.nodes:
        if node.target in (linear, grouped_linear, master_linear, scaled_mm, quantize_rowwise):
            _check_call(graph, context, node)
    _check_inputs(graph, context)
    return 0


def _fail(graph: fx.Graph, problem: str) -> None:
    raise VerifyError(problem, dump(graph))


def _check_call(graph: fx.Graph, context: PassContext, node: fx.Node) -> None:
    if not node.users and node not in context.unread:
        _fail(graph, f"{node.name} ({target_name(node.target)}) is dead")
    with context.capture.fake_mode:
        expected = node.target(*argument_values(node.args), **argument_values(node.kwargs))  # type: ignore[operator]
    # Shapes only: under autocast the dtype is that of the region, which this call of the fake does not see.
    for want, have in zip(_tensors(expected), _tensors(meta_value(node)), strict=True):
        if _differ(want.shape, have.shape):
            _fail(graph, f"{node.name} is {list(have.shape)} where its operator gives {list(want.shape)}")
    if node.target in (quantize_rowwise, master_linear):
        return
    given = arguments(node)
    weight, weight_scale = given["weight"], given["weight_scale"]
    pairs = {lifted.weight: lifted.weight_scale for lifted in context.capture.lifted.values()}
    # A call of the user's own reads neither half of a lifted pair.
    if pairs.get(weight, weight_scale) is not weight_scale or (weight not in pairs and weight_scale in pairs.values()):
        _fail(graph, f"{node.name} reads a weight and scale that are not a lifted pair")
    columns = {lifted.weight: lifted.column_inputs for lifted in context.capture.lifted.values()}
    read = tuple(n for n in (given.get("columns"), given.get("column_weight")) if n is not None)
    if columns.get(weight, read) != read:
        _fail(graph, f"{node.name} reads a weight with columns that are not its own")
    out = meta_tensor(node)
    if out is None or out.dtype not in FLOAT_DTYPES:
        _fail(graph, f"{node.name} is {None if out is None else out.dtype}, which no int8 product gives")


def _differ(a: torch.Size, b: torch.Size) -> bool:
    """Whether two shapes are known to differ; asking a symbolic size outright would add a guard, or fail."""
    return len(a) != len(b) or any(statically_known_true(m != n) for m, n in zip(a, b, strict=True))


def _tensors(value: object) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (cast(torch.Tensor, value),)


def _check_inputs(graph: fx.Graph, context: PassContext) -> None:
    placeholders = set(graph.find_nodes(op="placeholder"))
    for lifted in context.capture.lifted.values():
        if not all(node.users for node in lifted.inputs):
            _fail(graph, f"lifted input {lifted.weight.name} is not read")
        for node, _ in lifted.sources:
            if node in placeholders and not node.users and is_constant(node):
                _fail(graph, f"float weight {node.name} is left behind its rewritten site")
