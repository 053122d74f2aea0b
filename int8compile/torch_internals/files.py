"""torch's program files: the schema of their JSON, what it may name, and reading one."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch._export.serde import schema
from torch._export.serde.serialize import _SYM_OPS, deserialize_scalar_type
from torch._export.serde.union import _Union as Union
from torch.export.pt2_archive._package import load_pt2

__all__ = [
    "Union",
    "dispatched_operators",
    "drop_guards_of_equal_sizes",
    "dtype_of",
    "load_pt2",
    "schema",
    "size_functions",
    "vmap_functions",
]

#: such as ``L['x'].size()[0]``
_SIZE = r"L[\w'\[\].]*\.size\(\)\[\d+\]"
_EQUAL_SIZES = re.compile(f"{_SIZE} == {_SIZE}")


def size_functions() -> set[str]:
    """The functions of sizes that a file calls by name, such as ``_operator.add``."""
    return {f"{function.__module__}.{function.__name__}" for function in _SYM_OPS}


def vmap_functions() -> set[str]:
    """The functions that ``vmap`` leaves in a graph, by name."""
    return {
        f"torch._functorch.predispatch.{name}"
        for name in (
            *("_add_batch_dim", "_remove_batch_dim"),
            *("_vmap_increment_nesting", "_vmap_decrement_nesting"),
            "lazy_load_decompositions",
        )
    }


def dispatched_operators() -> frozenset[str]:
    """The names of all operators with kernels, such as ``aten::add.Tensor``; not those of TorchScript alone."""
    return frozenset(torch._C._dispatch_get_all_op_names())


def dtype_of(number: int) -> torch.dtype:
    """The dtype that a file has as a number.

    Raises:
        ValueError: there is none.
    """
    try:
        found: Any = deserialize_scalar_type(schema.ScalarType(number))
    except KeyError:
        raise ValueError(f"no dtype has the number {number}") from None
    dtype: torch.dtype = found
    return dtype


def drop_guards_of_equal_sizes(program: torch.export.ExportedProgram) -> None:
    """Of the code that checks a program's inputs, leave out what says that two sizes are one.

    ``module()`` says that by itself of inputs whose sizes are one symbol.
    """
    guards = [guard for guard in getattr(program, "_guards_code", []) if not _EQUAL_SIZES.fullmatch(guard)]
    program._guards_code = guards
