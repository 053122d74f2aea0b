"""The values that a program's JSON may hold, checked before torch reads it.

``torch.export.load`` trusts the JSON of a graph. It looks functions up by the names in it (``torch.os.system``,
``aten::from_file``), runs its size expressions and guards as Python, imports the modules that its trees of inputs name,
and writes its names into the Python code of the graph. So ``check_model`` takes what ``torch.export.save`` writes for a
graph that computes with tensors, and no more:

- exactly the fields of torch's own schema, each of its type, so that nothing is left out or passed over;
- names that are identifiers, and other texts without what could end a string in generated code;
- expressions of sizes as in ``size_expressions``; no guards, which ``save`` leaves out;
- PyTorch's operators that compute, and ours; of other libraries those whose namespace the caller names;
- trees of inputs and outputs of containers and registered classes, which import nothing.

What a program computes is not looked at: how long it takes and how much memory is up to who wrote it, and that it reads
nothing but its tensors to PyTorch's operators, which look at what they are given.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import keyword
import re
import sys
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SYM_OPS
from torch._export.serde.union import _Union
from torch.utils import _pytree as pytree

from int8compile.programs.size_expressions import is_size_expression, is_symbol

#: whose operators any program may call
NAMESPACES = ("aten", "prims", "int8compile")

_HIGHER_ORDER = {
    *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond", "flex_attention", "hints_wrapper"),
    *("invoke_subgraph", "map", "map_impl", "out_dtype", "scan", "while_loop"),
    *("wrap_with_autocast", "wrap_with_set_grad_enabled"),
}
_FUNCTIONS = frozenset(
    [f"{function.__module__}.{function.__name__}" for function in _SYM_OPS]
    + ["torch.sym_sum", "torch.sym_fresh_size"]
    # what vmap leaves in a graph
    + [f"torch._functorch.predispatch.{name}_batch_dim" for name in ("_add", "_remove")]
    + [f"torch._functorch.predispatch._vmap_{step}_nesting" for step in ("increment", "decrement")]
    + ["torch._functorch.predispatch.lazy_load_decompositions"]
)
# Of aten, by how their names begin: what reads files, prints or tests, and what takes a tensor's memory, or indices
# into it, as it is told, where others look at what they are given. _reshape_alias reads what lies behind the memory.
_NOT_CALLED = (
    *("from_file", "_print", "_test_", "_debug_", "_cufft_"),
    *("set_", "_reshape_alias", "_resize_output", "_copy_from", "_index_put_impl"),
    *("sparse_", "_sparse_", "_convert_indices", "_nested_", "segment_reduce", "_segment_reduce"),
)
_FACTORIES = ("bool", "dict", "float", "int", "list", "set", "str", "tuple")  # of defaultdicts
_METADATA = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "torch_fn")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TARGET = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


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


def check_model(model: Any, operators: Collection[str] | None) -> None:
    """Raise ``NotWrittenError`` unless ``torch.export.save`` could have written this ``model.json``.

    Args:
        model: as ``parse`` returns it.
        operators: namespaces of operators that the program may call beside ``NAMESPACES``; None for any.
    """
    _Check(operators).value(schema.ExportedProgram, model, "model")


def check_payload(config: Any) -> None:
    """The same of what describes the tensors in a file, ``model_weights_config.json`` and its like."""
    _Check(()).value(schema.PayloadConfig, config, "config")


def _refuse_constant(name: str) -> None:
    raise NotWrittenError(f"{name} is no number")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise NotWrittenError("a key stands in it twice")
    return found


@functools.cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    """A schema class's fields: what each holds, and whether it has to be there."""
    hints = typing.get_type_hints(kind, globalns=vars(schema))
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(kind)
    }


class _Check:
    """Walks down a value and torch's schema together, as torch does when it reads one."""

    def __init__(self, operators: Collection[str] | None) -> None:
        self.operators = operators
        self._dispatched = frozenset(torch._C._dispatch_get_all_op_names())

    def value(self, hint: Any, value: Any, field: str) -> None:
        """A value that stands in ``field``, given as ``Class.name``, which says what its texts may be."""
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is not None:
                self.value(next(kind for kind in inner if kind is not type(None)), value, field)
        elif origin is list:
            _expect(type(value) is list, "a list", value)
            for i, item in enumerate(value):
                self._at(f"[{i}]", inner[0], item, field)
        elif origin is dict:
            _expect(type(value) is dict, "an object", value)
            for key, item in value.items():
                _KEYS.get(field, _plain)(key)
                self._at(f".{key}", inner[1], item, field)
        elif isinstance(hint, type) and issubclass(hint, _Union):
            _expect(type(value) is dict and len(value) == 1, "an object of one entry", value)
            self._entries(hint, value)
        elif dataclasses.is_dataclass(hint):
            _expect(type(value) is dict, "an object", value)
            absent = [
                name for name, (_, needed) in _fields(typing.cast(Any, hint)).items() if needed and name not in value
            ]
            _expect(not absent, f"{', '.join(absent)} too", sorted(value))
            self._entries(hint, value)
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            _expect(type(value) is int and value in [member.value for member in hint], f"a {hint.__name__}", value)
        elif hint is str:
            _expect(type(value) is str, "a text", value)
            self._text(field, value)
        elif hint is float:  # torch writes infinite ones as texts
            _expect(type(value) in (float, int) or value in ("Infinity", "-Infinity", "NaN"), "a number", value)
        else:
            _expect(type(value) is hint, f"of type {hint.__name__}", value)
            _expect(hint is not int or -(2**63) <= value < 2**63, "a number of 64 bits", value)

    def _entries(self, kind: Any, value: dict[str, Any]) -> None:
        known = _fields(kind)
        for name, item in value.items():
            _expect(name in known, f"one of {', '.join(known)}", name)
            field = f"{kind.__name__}.{name}"
            _expect(field not in _NEVER, "something else", name)
            self._at(f".{name}", known[name][0], item, field)
            if field in _FURTHER:
                with _within(f".{name}"):
                    _FURTHER[field](item)

    def _at(self, place: str, hint: Any, value: Any, field: str) -> None:
        with _within(place):
            self.value(hint, value, field)

    def _text(self, field: str, text: str) -> None:
        if field in ("Node.target", "Argument.as_operator"):
            self._operator(text)
        else:
            _TEXTS.get(field, _plain)(text)

    def _operator(self, target: str) -> None:
        if target in _FUNCTIONS:
            return
        if target.removeprefix("torch.ops.higher_order.") in _HIGHER_ORDER:
            return
        parts = _TARGET.fullmatch(target)
        if parts is None:
            raise NotWrittenError(f"{target!r} is no operator that a program may call")
        namespace, name, overload = parts.groups()
        if namespace not in NAMESPACES:
            if self.operators is None or namespace in self.operators:
                return
            raise NotWrittenError(
                f"{target} is neither PyTorch's nor int8compile's; if you trust the file to call what the library "
                f"{namespace!r} registers, import it and say load(path, operators=[{namespace!r}])"
            )
        operator = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
        # Not those of TorchScript alone, such as aten::save, which writes a file.
        known = isinstance(operator, torch._ops.OpOverload) and operator.name() in self._dispatched
        if not known or (namespace == "aten" and name.startswith(_NOT_CALLED)):
            raise NotWrittenError(f"{target} is not an operator of torch {torch.__version__} that computes")


class _within:  # noqa: N801 (reads as the statement it is)
    """Says in an error where in the value it is."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, NotWrittenError):
            error.path.append(self.place)


def _expect(fits: bool, expected: str, value: object) -> None:
    if not fits:
        raise NotWrittenError(f"{str(value)[:80]!r}, where {expected} is expected")


def _plain(text: str) -> None:
    """Nothing that ends a string, a line or a comment, in whatever code it may come into."""
    _expect(text.isprintable() and not set(text) & set("\"'\\"), "a text without quotes and line ends", text)


def _identifier(text: str) -> None:
    _expect(_IDENTIFIER.fullmatch(text) is not None and not keyword.iskeyword(text), "a name", text)


def _argument_name(text: str) -> None:
    """Of an operator's argument in its schema (``from`` and ``else`` are such), or none."""
    _expect(text == "" or _IDENTIFIER.fullmatch(text) is not None, "a name", text)


def _any(text: str) -> None:
    """Of texts that are handed on as values and never come into code other than by ``repr``."""


def _symbol(text: str) -> None:
    _expect(is_symbol(text), "a size's symbol", text)


def _expression(text: str) -> None:
    _expect(is_size_expression(text), "an expression of sizes", text)


def _nothing(value: Any) -> None:
    _expect(not value, "nothing", value)


def _metadata_key(key: str) -> None:
    _expect(key in _METADATA, f"one of {', '.join(_METADATA)}", key)


def _node_metadata(metadata: dict[str, str]) -> None:
    for key in ("custom", "from_node"):
        if key in metadata:
            parse(metadata[key].encode(), strict=False)
    stack = metadata.get("nn_module_stack", "")
    _expect(stack.isprintable() and not set(stack) & set('"\\'), "modules", stack)
    sources = metadata.get("source_fn_stack", "")
    _expect(re.fullmatch(r"[\w.,;]*", sources) is not None, "functions by name", sources)


def _program_metadata(metadata: dict[str, str]) -> None:
    if "custom" in metadata:
        parse(metadata["custom"].encode(), strict=False)
    _expect(metadata.keys() <= {"custom"}, "custom alone", sorted(metadata))


def _constants_as_text(inputs: list[dict[str, Any]]) -> None:
    """Texts that a program takes as inputs stand in the code of its guards."""
    for argument in inputs:
        if "as_string" in argument:
            _plain(argument["as_string"])


def _verifiers(names: list[str]) -> None:
    _expect(bool(names) and set(names) <= {"ATEN", "TRAINING"}, "ATEN or TRAINING", names)


def _tree(text: str) -> None:
    """A tree of inputs or outputs, as pytree writes it."""
    tree = parse(text.encode())
    _expect(type(tree) is list and len(tree) == 2 and tree[0] == 1 and type(tree[0]) is int, "[1, tree]", tree)
    _tree_node(tree[1])


def _inputs_tree(text: str) -> None:
    """``((args), {kwargs})``; the names of the latter come into code as they are."""
    _tree(text)
    tree = parse(text.encode())[1]
    kinds = [child["type"] for child in tree["children_spec"]]
    _expect((tree["type"], kinds) == ("builtins.tuple", ["builtins.tuple", "builtins.dict"]), "(args, kwargs)", kinds)
    for name in json.loads(tree["children_spec"][1]["context"]):
        _expect(type(name) is str, "a name", name)
        _identifier(name)


def _tree_node(node: Any) -> None:
    _expect(type(node) is dict and set(node) == {"type", "context", "children_spec"}, "a node of a tree", node)
    kind, context, children = node["type"], node["context"], node["children_spec"]
    _expect(type(children) is list, "a list", children)
    if kind is None:
        _expect(context is None and not children, "a leaf", node)
        return
    _expect(type(kind) is str, "a class", kind)
    _plain(kind)
    if kind not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        raise NotWrittenError(f"the class {kind} is unknown here; import the library that it belongs to first")
    if kind == "collections.defaultdict":
        _expect(
            type(context) is dict
            and set(context) == {"default_factory_module", "default_factory_name", "dict_context"}
            and context["default_factory_module"] == "builtins"
            and context["default_factory_name"] in _FACTORIES,
            "a defaultdict of a builtin class",
            context,
        )
        keys = context["dict_context"]
    else:
        _expect(type(context) is str, "a text", context)
        # A namedtuple's is the name of its class alone.
        keys = context if kind == "collections.namedtuple" else parse(context.encode())
    if kind in ("builtins.dict", "collections.OrderedDict", "collections.defaultdict"):
        _expect(type(keys) is list and len(keys) == len(children), "a key for each child", keys)
    elif kind in ("builtins.tuple", "builtins.list"):
        _expect(keys is None, "null", keys)
    _tree_keys(keys)
    for child in children:
        _tree_node(child)


def _tree_keys(keys: Any) -> None:
    """Keys of dicts, and what a registered class says of itself."""
    if type(keys) is str:
        _plain(keys)
    elif type(keys) is list:
        for key in keys:
            _tree_keys(key)
    elif type(keys) is dict and "__enum__" in keys:
        _expect(_is_enum_member(keys), "a member of an enum that is imported here", keys)
    elif type(keys) is dict:
        for key, value in keys.items():
            _plain(key)
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


def _device(text: str) -> None:
    _expect(re.fullmatch(r"[a-z]{1,20}", text) is not None, "a device", text)


#: what texts may be, by the class and field of torch's schema; others are plain
_TEXTS: dict[str, Callable[[str], None]] = {
    **dict.fromkeys(
        (
            "TensorArgument.name",
            "TokenArgument.name",
            "GraphArgument.name",
            "Node.name",
            "SymIntArgument.as_name",
            "SymFloatArgument.as_name",
            "SymBoolArgument.as_name",
            "InputToConstantInputSpec.name",
            "GradientToUserInputSpec.user_input_name",
            "UserInputMutationSpec.user_input_name",
            "ModuleCallSignature.forward_arg_names",
        ),
        _identifier,
    ),
    "NamedArgument.name": _argument_name,
    "SymExpr.expr_str": _expression,
    "Device.type": _device,
    "Argument.as_string": _any,
    "Argument.as_strings": _any,
    "Node.metadata": _any,
    "GraphModule.metadata": _any,
    "ModuleCallSignature.in_spec": _inputs_tree,
    "ModuleCallSignature.out_spec": _tree,
}
#: the same of keys
_KEYS: dict[str, Callable[[str], None]] = {
    "Graph.tensor_values": _identifier,
    "Graph.sym_int_values": _identifier,
    "Graph.sym_float_values": _identifier,
    "Graph.sym_bool_values": _identifier,
    "ExportedProgram.range_constraints": _symbol,
    "Node.metadata": _metadata_key,
    "Argument.as_string_to_argument": _any,
}
#: what is asked of a field beside
_FURTHER: dict[str, Callable[[Any], None]] = {
    "Node.metadata": _node_metadata,
    "GraphModule.metadata": _program_metadata,
    "Graph.inputs": _constants_as_text,
    "Graph.custom_obj_values": _nothing,
    "ExportedProgram.guards_code": _nothing,
    "ExportedProgram.verifiers": _verifiers,
}
#: objects, which only a pickle can carry
_NEVER = ("Argument.as_custom_obj", "InputSpec.custom_obj")
