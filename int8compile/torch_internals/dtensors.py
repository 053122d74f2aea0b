"""DTensors: tensors of several processes, of which each process holds a plain tensor, its shard.

``torch.distributed.tensor`` takes a moment to import, and who has a DTensor has imported it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import fx

_MODULE = "torch.distributed.tensor"
#: methods that give a DTensor another layout, or its shard, and write to nothing
_LAYOUTS = ("to_local", "redistribute")


def is_dtensor(value: object) -> bool:
    """Whether a value is a DTensor, a fake one too."""
    kind = _dtensor()
    return kind is not None and isinstance(value, kind)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that holds this process's shard of a DTensor, always the same object; others as they are."""
    if not is_dtensor(tensor):
        return tensor
    local: torch.Tensor = tensor._local_tensor  # type: ignore[attr-defined]
    return local


def takes_shard(node: fx.Node) -> bool:
    """Whether a node is ``x.to_local()``; a ``grad_placements`` changes nothing of its value."""
    return node.op == "call_method" and node.target == "to_local" and is_dtensor(_value_of(node.args[0]))


def changes_layout(node: fx.Node) -> bool:
    """Whether a node is a call that gives values another layout, or says which they have, and writes to nothing."""
    if node.target is getattr:
        return node.args[1] == "device_mesh" and is_dtensor(_value_of(node.args[0]))
    if node.op == "call_method":
        return node.target in _LAYOUTS and is_dtensor(_value_of(node.args[0]))
    return makes_dtensor(node) and not node.kwargs.get("run_check")


def makes_dtensor(node: fx.Node) -> bool:
    """Whether a node is ``DTensor.from_local(x, mesh, placements, ...)``."""
    kind: Any = _dtensor()
    return node.op == "call_function" and kind is not None and node.target is kind.from_local


def from_local() -> Any:
    """The function that makes a DTensor of a local tensor, a mesh and placements, as it stands in graphs."""
    kind: Any = _dtensor()
    return kind.from_local


def layouts_can_be_written() -> bool:
    """Whether a graph's code can hold placements, as that of newer torch does."""
    return hasattr(sys.modules[_MODULE].Shard, "__fx_repr__")


def shard_dim(placement: Any) -> int | None:
    """The dimension that a placement shards; None for one that replicates.

    Raises:
        ValueError: it does neither: it is a summand, or shards in another order.
    """
    module = sys.modules[_MODULE]
    if type(placement) is module.Shard:
        dim: int = placement.dim
        return dim
    if type(placement) is module.Replicate:
        return None
    raise ValueError(str(placement))


def is_partial_sum(placement: Any) -> bool:
    """Whether each process holds a summand."""
    return type(placement) is sys.modules[_MODULE].Partial and placement.reduce_op == "sum"


def _value_of(argument: object) -> object:
    return argument.meta.get("example_value", argument.meta.get("val")) if isinstance(argument, fx.Node) else None


def _dtensor() -> type | None:
    return getattr(sys.modules.get(_MODULE), "DTensor", None)
