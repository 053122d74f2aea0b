"""Inputs that share memory at a later call of a compiled graph, and did not when it was captured.

Effects are found on the inputs of the capture. Dynamo and AOTAutograd guard what overlapped then, and compile anew for
inputs that come to overlap where the compiled code reads both. They do not see a read that was moved past a write, nor
a float weight, which the compiled code no longer reads. So for a graph that writes to an input, every call checks its
arguments for new overlaps, and runs in float if there are any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from int8compile.graph.capture import Capture
from int8compile.graph.dump import meta_tensor
from int8compile.passes.analysis.effects import Effects, storage_of
from int8compile.torch_internals.tensors import storage_key


def written_inputs(captured: Capture) -> list[int]:
    """Positions of the inputs that a rewritten graph may write to."""
    effects = Effects(captured.graph)
    tensors = [node for node in captured.kept if meta_tensor(node) is not None]
    return [captured.position[node] for node in tensors if effects.ever_written(node)]


def new_overlap(captured: Capture, written: Sequence[int]) -> Callable[[Sequence[Any]], bool]:
    """A function of a call's arguments: whether one that is written to shares its storage with more than it did."""
    values = {captured.position[node]: meta_tensor(node) for node in captured.kept}
    storages = {position: storage_of(value) for position, value in values.items() if value is not None}
    known = [position for position, storage in storages.items() if storage is not None]
    then = [storages[position] for position in known]
    sharing = _first_alike(then)
    counts_then = Counter(then)
    expected = [(i, counts_then[then[i]]) for i, position in enumerate(known) if position in written]

    def overlap(args: Sequence[Any]) -> bool:
        now = [storage_key(args[position]) for position in known]
        if _first_alike(now) == sharing:  # as at nearly every call
            return False
        counts = Counter(now)
        return any(counts[now[i]] > count for i, count in expected)

    return overlap


def _first_alike(values: Sequence[object]) -> list[int]:
    """For each value the index of the first that equals it."""
    first: dict[object, int] = {}
    return [first.setdefault(value, i) for i, value in enumerate(values)]
