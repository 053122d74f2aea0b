"""What in a Dynamo graph has side effects: it is not functional yet when our passes see it.

Two questions: does a value change between two nodes (then one quantised copy cannot serve both), and in which *region*
does a node stand (gradients on or off, autocast on or off)?
"""

from __future__ import annotations

import inspect

import torch
from torch import fx

from int8compile.graph_text import meta_tensor, meta_value

_SET_GRAD = torch._C._set_grad_enabled


def storage_of(node: fx.Node) -> int | None:
    """Identity of the storage behind a node's fake tensor; equal for views of one tensor. None if that is not known."""
    value = meta_tensor(node)
    try:
        return None if value is None else int(value.untyped_storage()._cdata)
    except NotImplementedError:  # a tensor that torch.func's transforms wrap
        return None


def mutated_nodes(node: fx.Node) -> list[fx.Node]:
    """The tensors a call changes in place; every tensor it is given where that cannot be told."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return []
    given = [n for n in node.all_input_nodes if meta_tensor(n) is not None]
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable:
            return []
        named = dict(zip((a.name for a in target._schema.arguments), node.args, strict=False)) | node.kwargs
        written = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        return [v for name in written if isinstance(v := named.get(name), fx.Node)]
    if isinstance(target, torch._ops.HigherOrderOperator) or node.op == "call_module":
        return given
    out = node.kwargs.get("out")
    if isinstance(out, fx.Node):
        return [out]
    return given[:1] if _writes_first(node) else []


def _writes_first(node: fx.Node) -> bool:
    """Whether a Python or builtin function changes its first argument, by PyTorch's naming rule."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in ("setitem", "__setitem__", "delitem", "set_"):
        return True
    if getattr(node.target, "__module__", None) == "_operator" and name.startswith("i") and name not in _NOT_INPLACE:
        return True
    if name.endswith("_") and not name.endswith("__"):
        return True
    if node.kwargs.get("inplace"):
        return True
    return _positional_inplace(node)


_NOT_INPLACE = {"index", "inv", "invert", "is_", "is_not", "itemgetter", "indexOf"}


def _positional_inplace(node: fx.Node) -> bool:
    if not inspect.isfunction(node.target):
        return False
    names = list(inspect.signature(node.target).parameters)
    position = names.index("inplace") if "inplace" in names else len(node.args)
    return position < len(node.args) and bool(node.args[position])


def changes_between(value: fx.Node, first: fx.Node, last: fx.Node) -> bool:
    """Whether anything may write to ``value``'s memory after ``first`` and before ``last``."""
    storage = storage_of(value)
    node = first.next
    while node is not last:
        for written in mutated_nodes(node):
            if written is value or storage is None or storage_of(written) in (None, storage):
                return True
        node = node.next
    return False


def written_storages(graph: fx.Graph) -> set[int | None]:
    """Storages that some node of the graph writes to."""
    return {storage_of(written) for node in graph.nodes for written in mutated_nodes(node)}


def regions(graph: fx.Graph, grad_enabled: bool) -> dict[fx.Node, tuple[int, bool]]:
    """For each node a region number and whether gradients are recorded there.

    A new region begins at every call that yields no tensor and switches something: autocast, gradients, saved-tensor
    hooks. Work is never moved from one region to another.
    """
    result: dict[fx.Node, tuple[int, bool]] = {}
    region = 0
    for node in graph.nodes:
        if node.op == "call_function" and node.target is _SET_GRAD:
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
