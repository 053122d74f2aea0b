"""Which nodes compute a linear, in the forms that ``normalize`` lists."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.graph.capture import constant_of
from int8compile.graph.dump import meta_tensor

aten = torch.ops.aten

_LINEAR = {torch.nn.functional.linear, aten.linear.default}
_MATMUL = {torch.matmul, torch.mm, operator.matmul, aten.matmul.default, aten.mm.default, "matmul", "mm", "__matmul__"}
_ADDMM = {torch.addmm, aten.addmm.default, "addmm"}
_EINSUM = {torch.einsum, torch.functional.einsum, aten.einsum.default}
_T = {torch.t, aten.t.default, "t", aten.numpy_T.default}  # of matrices; of more dimensions these reverse all
_SWAP = {torch.transpose, aten.transpose.int, "transpose", torch.swapaxes, "swapaxes", aten.swapaxes.default}
_PERMUTE = {torch.permute, aten.permute.default, "permute"}


class Linear(NamedTuple):
    """What a node computes, found to be x [..., K] times weight [N, K] (or [K, N] if ``transposed``) plus bias [N].

    ``weight`` is a 2-D parameter or buffer, or this process's shard of one (of ``F.linear`` any value; ``quantize``
    leaves others in float). A form that reaches it through more than transposes, such as an ``unsqueeze`` or a batch of
    1, has to undo that as ``resolve_transposes`` undoes transposes.

    ``beside``: what else it does, such as writing to ``out``, that no canonical node would.
    """

    x: fx.Node
    weight: fx.Node
    transposed: bool
    bias: fx.Node | None
    beside: str = ""


def match_linear(node: fx.Node) -> Linear | None:
    """The linear a node computes, or None."""
    if node.op not in ("call_function", "call_method"):
        return None
    target = node.target
    if target in _LINEAR:
        return _match_linear(node)
    if target in _MATMUL:
        return _match_product(_Call(node, ("input", "other")))
    if target in _ADDMM:
        return _match_addmm(_Call(node, ("input", "mat1", "other")))
    if target in _EINSUM:
        return _match_einsum(node)
    return None


class _Call:
    """A call's arguments by these names, and what it was given beside them (other than None)."""

    _OTHER_NAMES = (("self", "input"), ("mat2", "other"), ("tensor", "other"))  # aten's, and a method's

    def __init__(self, node: fx.Node, names: tuple[str, ...]) -> None:
        given: dict[str, object] = {name: value for name, value in node.kwargs.items() if value is not None}
        for theirs, ours in self._OTHER_NAMES:
            if theirs in given and ours not in given:
                given[ours] = given.pop(theirs)
        positional: tuple[object, ...] = node.args
        given |= dict(zip(names, positional, strict=False))
        self.args: list[object] = [given.pop(name, None) for name in names]
        self.rest: dict[str, object] = given
        if len(node.args) > len(names):
            self.rest["arguments"] = positional[len(names) :]

    @property
    def beside(self) -> str:
        return ", ".join(f"{name}=" for name in self.rest)


def _match_linear(node: fx.Node) -> Linear | None:
    call = _Call(node, ("input", "weight", "bias"))
    x, weight, bias = call.args
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    root, transposed = resolve_transposes(weight)
    if constant_of(root) is None:
        root, transposed = weight, False
    return Linear(x, root, transposed, bias if isinstance(bias, fx.Node) else None, call.beside)


def _match_product(call: _Call, bias: fx.Node | None = None) -> Linear | None:
    x, other = call.args[-2:]
    if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
        return None
    root, transposed = resolve_transposes(other)
    if constant_of(root) is None or _dims(root) != 2 or _dims(x) == 0:
        return None
    return Linear(x, root, not transposed, bias, call.beside)


def _match_addmm(call: _Call) -> Linear | None:
    bias = call.args[0]
    for scale in ("alpha", "beta"):
        if call.rest.get(scale) == 1:
            del call.rest[scale]
    if not isinstance(bias, fx.Node):
        return None
    linear = _match_product(call, bias)
    if linear is None or linear.beside:
        return linear
    weight, value = meta_tensor(linear.weight), meta_tensor(bias)
    if weight is None or value is None:
        return None
    outputs = weight.shape[1 if linear.transposed else 0]
    return linear if is_vector(bias, outputs) else linear._replace(beside=f"bias {list(value.shape)}")


def is_vector(node: fx.Node, size: object) -> bool:
    """Whether a value is known to be a tensor [size]."""
    value = meta_tensor(node)
    return value is not None and value.dim() == 1 and statically_known_true(value.shape[0] == size)


def _match_einsum(node: fx.Node) -> Linear | None:
    call = _Call(node, ("equation", "tensors"))
    equation, *operands = node.args or call.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if set(call.rest) - {"arguments", "path"}:
        return None
    if not isinstance(equation, str) or len(operands) != 2 or "->" not in equation:
        return None
    left, out = equation.replace(" ", "").split("->")
    if left.count(",") != 1:
        return None
    x_labels, w_labels = left.split(",")
    x, weight = operands
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
        return None
    if constant_of(resolve_transposes(weight)[0]) is None:
        (x, x_labels), (weight, w_labels) = (weight, w_labels), (x, x_labels)
    root, transposed = resolve_transposes(weight)
    if constant_of(root) is None or len(w_labels) != 2 or "." in w_labels or len(set(w_labels)) != 2 or not x_labels:
        return None
    k = x_labels[-1]
    if (
        k not in w_labels
        or k == "."
        or x_labels.count(k) != 1
        or len(set(x_labels.replace(".", ""))) != len(x_labels.replace(".", ""))
    ):
        return None
    n = w_labels.replace(k, "")
    if out != x_labels[:-1] + n or n in x_labels or not _same_size(x, -1, weight, w_labels.index(k)):
        return None
    return Linear(x, root, transposed != (w_labels[0] == k), None)


def _same_size(a: fx.Node, i: int, b: fx.Node, j: int) -> bool:
    """Whether two dimensions are known to have one size: an einsum takes one of size 1 for any other."""
    left, right = meta_tensor(a), meta_tensor(b)
    return left is not None and right is not None and statically_known_true(left.shape[i] == right.shape[j])


def resolve_transposes(node: fx.Node, dims: int = 2) -> tuple[fx.Node, bool]:
    """Follow a value back through transposes: where it comes from, and whether an odd number was passed.

    Args:
        dims: how many dimensions the value has to have; its last two are what is transposed.
    """
    transposed = False
    while (source := _transposed_source(node, dims)) is not None:
        node, transposed = source, not transposed
    return node, transposed


def _transposed_source(node: fx.Node, dims: int) -> fx.Node | None:
    if node.op not in ("call_function", "call_method") or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, *rest = node.args
    assert isinstance(source, fx.Node)
    if _dims(source) != dims or node.kwargs:
        return None
    given = [r for a in rest for r in (a if isinstance(a, (list, tuple)) else [a])]
    order = [d % dims for d in given if isinstance(d, int)] if all(isinstance(d, int) for d in given) else []
    *front, first, last = range(dims)
    if node.target is aten.mT.default or (node.target in _T and dims == 2):
        return source
    if node.target in _SWAP and order in ([first, last], [last, first]):
        return source
    if node.target in _PERMUTE and order == [*front, last, first]:
        return source
    if node.target is getattr and rest and (rest[0] == "mT" or (rest[0] == "T" and dims == 2)):
        return source
    return None


def _dims(node: fx.Node) -> int | None:
    value = meta_tensor(node)
    return None if value is None else value.dim()
