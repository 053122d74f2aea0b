"""Inputs that share memory at a later call of a compiled graph, and did not when it was captured.

Effects are found on the inputs of the capture, and passes moved reads past writes to other inputs. If those come to
overlap later, nothing sees it: Dynamo and AOTAutograd guard the overlaps that were there at first. So a graph in which
such a read was moved compares its arguments at each call, and runs in float if they overlap. Most graphs have none.

Float weights, which a compiled graph no longer reads, are looked after where they are resolved
(``int8compile/weights/lifted_inputs.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from int8compile.graph.capture import Capture
from int8compile.graph.dump import meta_tensor
from int8compile.passes.analysis.effects import Effects, storage_of
from int8compile.torch_internals.dtensors import local_of
from int8compile.torch_internals.tensors import storage_key


def written_inputs(captured: Capture) -> list[int]:
    """Positions of the inputs that a rewritten graph may write to."""
    effects = Effects(captured.graph)
    tensors = [node for node in captured.kept if meta_tensor(node) is not None]
    return [captured.position[node] for node in tensors if effects.ever_written(node)]


def later_overlap(captured: Capture) -> Callable[[Sequence[Any]], bool] | None:
    """A function of a call's arguments: whether two overlap that passes took to lie apart; None if there are none."""
    positions: dict[int, list[int]] = {}
    for node in captured.kept:
        value = meta_tensor(node)
        storage = None if value is None else storage_of(value)
        if storage is not None:
            positions.setdefault(storage, []).append(captured.position[node])
    pairs = {
        (read, written)
        for storages in captured.apart
        for read in positions.get(storages[0], ())
        for written in positions.get(storages[1], ())
    }
    return (lambda args: any(_overlap(args[i], args[j]) for i, j in pairs)) if pairs else None


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors may have an element in common: whether what lies from the first to the last does."""
    if storage_key(a) != storage_key(b):
        return False
    (start, end), (other_start, other_end) = _extent(a), _extent(b)
    return start < other_end and other_start < end


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    tensor = local_of(tensor)
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
