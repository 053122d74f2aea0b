"""JSON that has one meaning, and the values that may stand in it: plain texts, names, and trees of inputs and outputs.

A tree is a text of JSON within the JSON, as pytree writes it: containers and registered classes, none of which imports
anything.
"""

from __future__ import annotations

import enum
import json
import keyword
import re
import sys
from typing import Any

from torch.utils import _pytree as pytree

_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")  # of defaultdicts
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class NotWrittenError(ValueError):
    """Something that ``save`` would not write; ``path`` says where it stands, outermost last."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.path: list[str] = []

    def __str__(self) -> str:
        where = "".join(reversed(self.path)).lstrip(".")
        return f"{where}: {self.args[0]}" if where else str(self.args[0])


def parse(data: bytes, *, strict: bool = True) -> Any:
    """JSON with one meaning: UTF-8, no key twice and, if strict, no NaN.

    Raises:
        ValueError: it is not.
    """
    try:
        refused = _refuse_constant if strict else None
        return json.loads(data.decode("utf-8"), object_pairs_hook=_without_twins, parse_constant=refused)
    except RecursionError:
        raise NotWrittenError("it is nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise NotWrittenError(f"{name} is no number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotWrittenError("a key stands in it twice")
    return found


class within:  # noqa: N801 (reads as the statement it is)
    """Says in an error where in the value it is."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotWrittenError):
            error.path.append(self.place)


def expect(fits: bool, expected: str, value: object) -> None:
    """Raise ``NotWrittenError`` unless a value fits what is expected of it."""
    if not fits:
        raise NotWrittenError(f"{str(value)[:80]!r}, where {expected} is expected")


def plain(text: str) -> None:
    """Nothing that ends a string, a line or a comment, in whatever code it may come into."""
    expect(text.isprintable() and not set(text) & set("\"'\\"), "a text without quotes and line ends", text)


def identifier(text: str) -> None:
    """A name that Python takes for one."""
    expect(_IDENTIFIER.fullmatch(text) is not None and not keyword.iskeyword(text), "a name", text)


def argument_name(text: str) -> None:
    """Of an operator's argument in its schema (``from`` and ``else`` are such), or none."""
    expect(text == "" or _IDENTIFIER.fullmatch(text) is not None, "a name", text)


def tree_text(text: str) -> None:
    """A tree of inputs or outputs, as pytree writes it."""
    tree = parse(text.encode())
    expect(type(tree) is list and len(tree) == 2 and tree[0] == 1 and type(tree[0]) is int, "[1, tree]", tree)
    _tree_node(tree[1])


def inputs_tree(text: str) -> None:
    """``((args), {kwargs})``; the names of the latter come into code as they are."""
    tree_text(text)
    tree = parse(text.encode())[1]
    kinds = [child["type"] for child in tree["children_spec"]]
    expect((tree["type"], kinds) == ("builtins.tuple", ["builtins.tuple", "builtins.dict"]), "(args, kwargs)", kinds)
    for name in json.loads(tree["children_spec"][1]["context"]):
        expect(type(name) is str, "a name", name)
        identifier(name)


def _tree_node(node: Any) -> None:
    expect(type(node) is dict and set(node) == {"type", "context", "children_spec"}, "a node of a tree", node)
    kind, context, children = node["type"], node["context"], node["children_spec"]
    expect(type(children) is list, "a list", children)
    if kind is None:
        expect(context is None and not children, "a leaf", node)
        return
    expect(type(kind) is str, "a class", kind)
    plain(kind)
    if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise NotWrittenError(f"the class {kind} is unknown here; import the library that it belongs to first")
    if kind == "collections.defaultdict":
        expect(
            type(context) is dict
            and set(context) == {"default_factory_module", "default_factory_name", "dict_context"}
            and context["default_factory_module"] == "builtins"
            and context["default_factory_name"] in _FACTORIES,
            "a defaultdict of a builtin class",
            context,
        )
        keys = context["dict_context"]
    else:
        expect(type(context) is str, "a text", context)
        # A namedtuple's is the name of its class alone.
        keys = context if kind == "collections.namedtuple" else parse(context.encode())
    if kind in ("builtins.dict", "collections.OrderedDict", "collections.defaultdict"):
        expect(type(keys) is list and len(keys) == len(children), "a key for each child", keys)
    elif kind in ("builtins.tuple", "builtins.list"):
        expect(keys is None, "null", keys)
    _tree_keys(keys)
    for child in children:
        _tree_node(child)


def _tree_keys(keys: Any) -> None:
    """Keys of dicts, and what a registered class says of itself."""
    if type(keys) is str:
        plain(keys)
    elif type(keys) is list:
        for key in keys:
            _tree_keys(key)
    elif type(keys) is dict and "__enum__" in keys:
        expect(_is_enum_member(keys), "a member of an enum that is imported here", keys)
    elif type(keys) is dict:
        for key, value in keys.items():
            plain(key)
            _tree_keys(value)


def _is_enum_member(value: dict[str, Any]) -> bool:
    """torch imports the module that it names."""
    if set(value) != {"__enum__", "fqn", "name"} or type(value["fqn"]) is not str or type(value["name"]) is not str:
        return False
    module, _, path = value["fqn"].partition(":")
    found: Any = sys.modules.get(module)
    for name in path.split("."):
        found = vars(found).get(name) if found is not None else None
    return isinstance(found, type) and issubclass(found, enum.Enum) and value["name"] in found.__members__
