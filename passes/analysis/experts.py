"""Which nodes multiply by a weight that holds several experts' matrices, and which linears choose among experts.

The forms that ``passes/experts.py`` lists, and others, which are only said to be there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.graph.capture import constant_of
from int8compile.graph.dump import meta_tensor
from int8compile.ops import grouped_linear
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.linears import resolve_transposes
from int8compile.torch_internals.operators import overloads_of

aten = torch.ops.aten

#: operators by name: transformers' own is there only where transformers is
_GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
_PYTHON_MATMUL = {operator.matmul, "__matmul__"}
_PRODUCTS = {torch.bmm, "bmm", aten.bmm.default, torch.matmul, "matmul", aten.matmul.default} | _PYTHON_MATMUL
#: products of more operands, of which no form is ours
_OTHERS = {torch.baddbmm, "baddbmm", aten.baddbmm.default, torch.einsum, torch.functional.einsum, aten.einsum.default}
_INDEX = {operator.getitem, "__getitem__", aten.index.Tensor}
_INDEX_SELECT = {torch.index_select, "index_select", aten.index_select.default}
_TOPK = {torch.topk, "topk", aten.topk.default}


class Gather(NamedTuple):
    """``weight[ids]``: a matrix for each row."""

    node: fx.Node
    ids: fx.Node


class Experts(NamedTuple):
    """What a node computes, found to be x times experts' weights [E, N, K] (or [E, K, N] if ``transposed``).

    Args:
        x: [S, K] with ``offsets``; with ``gather`` [S, 1, K], or [S, K, 1] if it is the second operand; with neither
            [E, M, K], M rows for each expert.
        offsets: [E], where each expert's rows end.
        gather: what picks a matrix for each row.
        one: with ``gather`` the dimension of x, and of the result, whose size is 1.
        beside: what makes the form another than ours; then nothing but ``weight`` need be right.
    """

    x: fx.Node
    weight: fx.Node
    transposed: bool
    offsets: fx.Node | None = None
    gather: Gather | None = None
    one: int = 1
    beside: str = ""


def match_experts(node: fx.Node) -> Experts | None:
    """The product with experts' weights that a node computes, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _PRODUCTS:
        return _match_product(node)
    if node.target in _OTHERS:
        return _match_other(node)
    return _match_grouped(node) if _is_grouped(node.target) else None


def _is_grouped(target: Callable[..., Any] | str) -> bool:
    if target is getattr(torch.nn.functional, "grouped_mm", None):
        return True
    return any(overload._schema.name in _GROUPED for overload in overloads_of(target))


def _match_grouped(node: fx.Node) -> Experts | None:
    given = arguments(node)
    x, weight, *_ = [*given.values(), None, None]  # torch and transformers have two names for each
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    found = _weight_of(weight)
    if found is None or found[2] is not None:
        return None
    root, swapped, _ = found
    value, out, ends = meta_tensor(x), meta_tensor(node), _integers(given.get("offs"))
    beside = ""
    if value is None or out is None or value.dim() != 2 or ends is None:
        beside = "not rows by offsets"
    elif given.get("bias") is not None:
        beside = "bias="
    elif out.dtype != value.dtype:
        beside = f"{_short(value.dtype)} to {_short(out.dtype)}"
    return Experts(x, root, not swapped, ends, beside=beside)


def _match_product(node: fx.Node) -> Experts | None:
    # (Python's ``@`` is no operator of torch's, which would name them.)
    given = tuple(node.args) if node.target in _PYTHON_MATMUL else tuple(arguments(node).values())
    x, other = (*given, None, None)[:2]
    rest = given[2:]
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
        return None
    operands = (x, other)
    found = [_weight_of(operand) for operand in operands]
    at = next((i for i in (1, 0) if found[i] is not None), None)
    if at is None or (of := found[at]) is None:
        return None
    root, swapped, gather = of
    x = operands[1 - at]
    value, out = meta_tensor(x), meta_tensor(node)
    beside = ""
    if any(rest):
        beside = "out="
    elif value is None or out is None:
        beside = "no tensor"
    elif out.dtype != value.dtype:
        beside = f"{_short(value.dtype)} to {_short(out.dtype)}"
    elif gather is None:
        beside = "" if at == 1 and value.dim() == 3 and _as_many(value, out) else "all experts at once"
    elif value.dim() != 3 or not statically_known_true(value.shape[1 if at else 2] == 1):
        beside = "several rows of an expert"
    elif not _as_many(value, out) or not _as_many(meta_tensor(gather.ids), out):
        beside = "rows that are broadcast"
    # x @ weight has the weight [K, N] before any transposes; weight @ x has it [N, K].
    return Experts(x, root, swapped != (at == 1), gather=gather, one=1 if at else 2, beside=beside)


def _match_other(node: fx.Node) -> Experts | None:
    for operand in node.all_input_nodes:
        if (found := _weight_of(operand)) is not None:
            root, swapped, _ = found
            return Experts(node, root, not swapped, beside=str(getattr(node.target, "__name__", node.target)))
    return None


def _weight_of(node: fx.Node) -> tuple[fx.Node, bool, Gather | None] | None:
    """The constant [E, ., .] that a value is, or is gathered from, whether transposed, and what gathers."""
    root, swapped = resolve_transposes(node, 3)
    gather = _gather(root)
    if gather is not None:
        root, before = resolve_transposes(gather[0], 3)
        swapped ^= before
    value = meta_tensor(root)
    if constant_of(root) is None or value is None or value.dim() != 3 or value.shape[0] < 2:
        return None
    return root, swapped, None if gather is None else gather[1]


def _gather(node: fx.Node) -> tuple[fx.Node, Gather] | None:
    """What a node gathers from along its first dimension, and by which indices [S]."""
    if node.op not in ("call_function", "call_method") or not node.args or node.kwargs:
        return None
    source, *rest = node.args
    if node.target in _INDEX and len(rest) == 1:
        index = rest[0]
        ids = index[0] if isinstance(index, (list, tuple)) and len(index) == 1 else index
    elif node.target in _INDEX_SELECT and len(rest) == 2 and rest[0] == 0:
        ids = rest[1]
    else:
        return None
    found, value = _integers(ids), meta_tensor(node)
    if not isinstance(source, fx.Node) or found is None or value is None or value.dim() != 3:
        return None
    return source, Gather(node, found)


def _integers(value: object) -> fx.Node | None:
    """The value, if it is a vector of integers."""
    tensor = meta_tensor(value) if isinstance(value, fx.Node) else None
    whole = tensor is not None and tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    return value if whole and isinstance(value, fx.Node) else None


def _as_many(value: torch.Tensor | None, out: torch.Tensor) -> bool:
    """Whether the first dimension is no broadcast one."""
    return value is not None and statically_known_true(value.shape[0] == out.shape[0])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def routers(graph: fx.Graph, linears: list[fx.Node]) -> set[fx.Node]:
    """Those of the linears that choose among experts: as many features as a weight has experts, and topk of them."""
    counts = set()
    for node in graph.nodes:
        experts = match_experts(node)
        weight = arguments(node)["weight"] if node.target is grouped_linear else experts.weight if experts else None
        whole = constant_of(weight) if isinstance(weight, fx.Node) else None  # all experts, of a DTensor's shard too
        value = meta_tensor(whole) if whole is not None else None
        if value is not None:
            counts.add(int(value.shape[0]))
    found = set()
    for node in linears if counts else ():
        value = meta_tensor(node)
        if value is not None and any(statically_known_true(value.shape[-1] == n) for n in counts) and _chooses(node):
            found.add(node)
    return found


def _chooses(linear: fx.Node) -> bool:
    """Whether a topk reads a linear's result, or what is computed from it and no other product."""
    seen, todo = {linear}, [linear]
    while todo:
        for user in todo.pop().users:
            if user.target in _TOPK:
                return True
            if user not in seen and _is_small_step(user, linear):
                seen.add(user)
                todo.append(user)
    return False


def _is_small_step(node: fx.Node, linear: fx.Node) -> bool:
    """Whether a node computes as many numbers as the linear does, or picks a part of what it is given."""
    value, of = meta_tensor(node), meta_tensor(linear)
    same = value is not None and of is not None and statically_known_true(value.numel() == of.numel())
    return node.target is operator.getitem or same
