"""``dump``: an FX graph as text that is the same in every run, process and torch version.

Golden tests, ``explain()`` and the debug log all print this form, one node a line::

    %0 = input "x" : f32[s0, 64]
    %1 = weight "layers.0.fc.weight" int8 : i8[128, 64]
    %2 = int8compile.linear(%0, %1, ...) : f32[s0, 128]
    return %2

Values are numbered and symbolic sizes renamed (s0, s1, ...) by first appearance, ``.default`` is dropped and
floats are printed with ``%g``: argument names, hashed symbols and addresses never reach the text. ``DUMP_VERSION``
counts the changes of this form, each of which makes all goldens differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import fx

DUMP_VERSION = 1

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "bool",
}


def meta_value(node: fx.Node) -> object:
    """The fake value a node stands for: Dynamo's ``example_value``, or ``val`` in an exported graph."""
    return node.meta.get("example_value", node.meta.get("val"))


def meta_tensor(node: fx.Node) -> torch.Tensor | None:
    """``meta_value`` if it is a tensor."""
    value = meta_value(node)
    return value if isinstance(value, torch.Tensor) else None


def dump(graph: fx.Graph | fx.GraphModule) -> str:
    """The graph as stable text (see the module's docstring for the form).

    Args:
        graph: a graph whose nodes carry ``meta["example_value"]`` or ``meta["val"]``; where one does not, the
            type after the colon is left out.
    """
    graph = graph.graph if isinstance(graph, fx.GraphModule) else graph
    writer = _Writer()
    return "\n".join(writer.line(node) for node in graph.nodes) + "\n"


class _Writer:
    def __init__(self) -> None:
        self._values: dict[fx.Node, str] = {}
        self._symbols: dict[str, str] = {}

    def line(self, node: fx.Node) -> str:
        if node.op == "output":
            return f"return {self._argument(node.args[0])}"
        name = self._values.setdefault(node, f"%{len(self._values)}")
        kind = self._type(meta_value(node))
        return f"{name} = {self._right_hand_side(node)}" + (f" : {kind}" if kind else "")

    def _right_hand_side(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return str(node.meta.get("int8compile_input", "input"))
        if node.op == "get_attr":
            return f"attribute {node.target}"
        arguments = [self._argument(a) for a in node.args]
        arguments += [f"{k}={self._argument(v)}" for k, v in sorted(node.kwargs.items())]
        if node.op == "call_method":
            return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
        return f"{target_name(node.target)}({', '.join(arguments)})"

    def _argument(self, value: object) -> str:
        match value:
            case fx.Node():
                return self._values.get(value, "%?")
            case bool() | None:
                return str(value)
            case float():
                return f"{value:g}"
            case str():
                return repr(value)
            case torch.dtype():
                return _DTYPES.get(value, str(value).removeprefix("torch."))
            case torch.SymInt():
                return self._size(value)
            case tuple() | list():
                left, right = "()" if isinstance(value, tuple) else "[]"
                return left + ", ".join(self._argument(v) for v in value) + right
            case dict():
                return "{" + ", ".join(f"{k}: {self._argument(v)}" for k, v in value.items()) + "}"
            case slice():
                return ":".join("" if v is None else self._argument(v) for v in (value.start, value.stop, value.step))
            case _:
                return re.sub(r" at 0x[0-9a-f]+", "", str(value))

    def _type(self, value: object) -> str:
        if isinstance(value, torch.Tensor):
            dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
            return f"{dtype}[{', '.join(self._size(s) for s in value.shape)}]"
        if isinstance(value, (tuple, list)) and all(isinstance(v, torch.Tensor) for v in value):
            return "(" + ", ".join(self._type(v) for v in value) + ")"
        return self._size(value) if isinstance(value, torch.SymInt) else ""

    def _size(self, size: int | torch.SymInt) -> str:
        def rename(match: re.Match[str]) -> str:
            return self._symbols.setdefault(match.group(), f"s{len(self._symbols)}")

        return re.sub(r"\b[su]\d+\b", rename, str(size))


def target_name(target: Callable[..., object] | str) -> str:
    """How a call's target is printed: ``aten.linear``, ``torch.nn.functional.silu``, ``operator.add``."""
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    module = (getattr(target, "__module__", None) or "").removeprefix("_")
    name = getattr(target, "__name__", str(target))
    return f"{module}.{name}" if module else name
