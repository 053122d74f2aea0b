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

What a program computes is not checked. It may take any time and memory. That it reads no memory but its own tensors'
relies on PyTorch's operators, which check their arguments.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any

import torch

from int8compile.programs.json_values import (
    NotWrittenError,
    argument_name,
    expect,
    identifier,
    inputs_tree,
    parse,
    plain,
    tree_text,
    within,
)
from int8compile.programs.size_expressions import is_size_expression, is_symbol
from int8compile.torch_internals import files
from int8compile.torch_internals.files import schema

#: whose operators any program may call
NAMESPACES = ("aten", "prims", "int8compile")

_HIGHER_ORDER = {
    *("associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond", "flex_attention", "hints_wrapper"),
    *("invoke_subgraph", "map", "map_impl", "out_dtype", "scan", "while_loop"),
    *("wrap_with_autocast", "wrap_with_set_grad_enabled"),
}
_FUNCTIONS = files.size_functions() | files.vmap_functions() | {"torch.sym_sum", "torch.sym_fresh_size"}
# Of aten, by how their names begin: what reads files, prints or tests, and what takes a tensor's memory, or indices
# into it, as it is told, where others look at what they are given. _reshape_alias reads what lies behind the memory.
_NOT_CALLED = (
    *("from_file", "_print", "_test_", "_debug_", "_cufft_"),
    *("set_", "_reshape_alias", "_resize_output", "_copy_from", "_index_put_impl"),
    *("sparse_", "_sparse_", "_convert_indices", "_nested_", "segment_reduce", "_segment_reduce"),
)
_METADATA = ("custom", "from_node", "nn_module_stack", "source_fn_stack", "torch_fn")
_TARGET = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)", re.ASCII)


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
        self._dispatched = files.dispatched_operators()

    def value(self, hint: Any, value: Any, field: str) -> None:
        """A value that stands in ``field``, given as ``Class.name``, which says what its texts may be."""
        origin, inner = typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            if value is not None:
                self.value(next(kind for kind in inner if kind is not type(None)), value, field)
        elif origin is list:
            expect(type(value) is list, "a list", value)
            for i, item in enumerate(value):
                self._at(f"[{i}]", inner[0], item, field)
        elif origin is dict:
            expect(type(value) is dict, "an object", value)
            for key, item in value.items():
                _KEYS.get(field, plain)(key)
                self._at(f".{key}", inner[1], item, field)
        elif isinstance(hint, type) and issubclass(hint, files.Union):
            expect(type(value) is dict and len(value) == 1, "an object of one entry", value)
            self._entries(hint, value)
        elif dataclasses.is_dataclass(hint):
            expect(type(value) is dict, "an object", value)
            absent = [
                name for name, (_, needed) in _fields(typing.cast(Any, hint)).items() if needed and name not in value
            ]
            expect(not absent, f"{', '.join(absent)} too", sorted(value))
            self._entries(hint, value)
        elif isinstance(hint, type) and issubclass(hint, enum.Enum):
            expect(type(value) is int and value in [member.value for member in hint], f"a {hint.__name__}", value)
        elif hint is str:
            expect(type(value) is str, "a text", value)
            self._text(field, value)
        elif hint is float:  # torch writes infinite ones as texts
            expect(type(value) in (float, int) or value in ("Infinity", "-Infinity", "NaN"), "a number", value)
        else:
            expect(type(value) is hint, f"of type {hint.__name__}", value)
            expect(hint is not int or -(2**63) <= value < 2**63, "a number of 64 bits", value)

    def _entries(self, kind: Any, value: dict[str, Any]) -> None:
        known = _fields(kind)
        for name, item in value.items():
            expect(name in known, f"one of {', '.join(known)}", name)
            field = f"{kind.__name__}.{name}"
            expect(field not in _NEVER, "something else", name)
            self._at(f".{name}", known[name][0], item, field)
            if field in _FURTHER:
                with within(f".{name}"):
                    _FURTHER[field](item)

    def _at(self, place: str, hint: Any, value: Any, field: str) -> None:
        with within(place):
            self.value(hint, value, field)

    def _text(self, field: str, text: str) -> None:
        if field in ("Node.target", "Argument.as_operator"):
            self._operator(text)
        else:
            _TEXTS.get(field, plain)(text)

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


def _any(text: str) -> None:
    """Of texts that are handed on as values and never come into code other than by ``repr``."""


def _symbol(text: str) -> None:
    expect(is_symbol(text), "a size's symbol", text)


def _expression(text: str) -> None:
    expect(is_size_expression(text), "an expression of sizes", text)


def _nothing(value: Any) -> None:
    expect(not value, "nothing", value)


def _metadata_key(key: str) -> None:
    expect(key in _METADATA, f"one of {', '.join(_METADATA)}", key)


def _node_metadata(metadata: dict[str, str]) -> None:
    for key in ("custom", "from_node"):
        if key in metadata:
            parse(metadata[key].encode(), strict=False)
    stack = metadata.get("nn_module_stack", "")
    expect(stack.isprintable() and not set(stack) & set('"\\'), "modules", stack)
    sources = metadata.get("source_fn_stack", "")
    expect(re.fullmatch(r"[\w.,;]*", sources) is not None, "functions by name", sources)


def _program_metadata(metadata: dict[str, str]) -> None:
    if "custom" in metadata:
        parse(metadata["custom"].encode(), strict=False)
    expect(metadata.keys() <= {"custom"}, "custom alone", sorted(metadata))


def _constants_as_text(inputs: list[dict[str, Any]]) -> None:
    """Texts that a program takes as inputs stand in the code of its guards."""
    for argument in inputs:
        if "as_string" in argument:
            plain(argument["as_string"])


def _verifiers(names: list[str]) -> None:
    expect(bool(names) and set(names) <= {"ATEN", "TRAINING"}, "ATEN or TRAINING", names)


def _device(text: str) -> None:
    expect(re.fullmatch(r"[a-z]{1,20}", text) is not None, "a device", text)


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
        identifier,
    ),
    "NamedArgument.name": argument_name,
    "SymExpr.expr_str": _expression,
    "Device.type": _device,
    "Argument.as_string": _any,
    "Argument.as_strings": _any,
    "Node.metadata": _any,
    "GraphModule.metadata": _any,
    "ModuleCallSignature.in_spec": inputs_tree,
    "ModuleCallSignature.out_spec": tree_text,
}
#: the same of keys
_KEYS: dict[str, Callable[[str], None]] = {
    "Graph.tensor_values": identifier,
    "Graph.sym_int_values": identifier,
    "Graph.sym_float_values": identifier,
    "Graph.sym_bool_values": identifier,
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
