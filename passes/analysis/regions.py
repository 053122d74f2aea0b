"""The gradient, autocast and ``torch.func`` regions that each node of a graph is in."""

from __future__ import annotations

import torch
from torch import fx

from int8compile.graph.dump import meta_value
from int8compile.torch_internals.graphs import SET_GRAD_ENABLED


def regions(graph: fx.Graph, grad_enabled: bool) -> dict[fx.Node, tuple[int, bool]]:
    """For each node a region number and whether gradients are recorded there.

    A new region begins at every call that yields no tensor and switches something: autocast, gradients, saved-tensor
    hooks. Work is never moved from one region to another.
    """
    result: dict[fx.Node, tuple[int, bool]] = {}
    region = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target is SET_GRAD_ENABLED:
            region, grad_enabled = region + 1, bool(node.args[0])
        elif node.op == "call_function" and meta_value(node) is None and not _is_known_pure(node):
            region += 1
        result[node] = (region, grad_enabled)
    return result


def transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes inside a transform of ``torch.func`` (vmap, grad, jvp ...), whose tensors stand for something else.

    Dynamo writes the transform itself into the graph: calls that begin and end it, and the operations in between.
    """
    inside: set[fx.Node] = set()
    depth = 0
    for node in graph.nodes:
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        depth -= name.endswith("_decrement_nesting") or name == "_exit_dual_level"
        if depth > 0:
            inside.add(node)
        depth += name.endswith("_increment_nesting") or name == "_enter_dual_level"
    return inside


def _is_known_pure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) or getattr(node.target, "__module__", "") == "_operator"
