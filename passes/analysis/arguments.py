"""A call's arguments by the names in its operator's schema, however they were written."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from int8compile.torch_internals.operators import overloads_of


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call, those left out with their defaults; none where the names are not known.

    The names are those of the first overload that takes these arguments (``self`` for a tensor's own method), or those
    of a function written in Python.
    """
    overloads = overloads_of(node.target)
    for overload in overloads:
        given = bind(overload._schema, node.args, node.kwargs)
        if given is not None:
            return {a.name: given.get(a.name, a.default_value) for a in overload._schema.arguments}
    if overloads or not inspect.isfunction(node.target):
        return {}
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def bind(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments that a call gives, by a schema's names; None if the schema does not take them."""
    positional = [a for a in schema.arguments if not a.kwarg_only]
    if len(args) > len(positional) > 0 and str(positional[-1].type) in ("List[int]", "List[SymInt]"):
        args = (*args[: len(positional) - 1], args[len(positional) - 1 :])  # x.resize_(2, 3)
    if len(args) > len(positional) or not set(kwargs) <= {a.name for a in schema.arguments}:
        return None
    given = dict(zip((a.name for a in positional), args, strict=False)) | dict(kwargs)
    return given if all(a.name in given or a.has_default_value() for a in schema.arguments) else None
