"""What fills a compiled graph's lifted inputs, at each of its calls.

A compiled graph cannot hold int8 weights itself: two models of one class share one graph, and a weight can change
or be replaced without a recompile. So graphs take int8 weights as inputs, and the function that Dynamo calls
(``_runner`` in ``backend.py`` makes it) asks for them at each call.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from int8compile.torch_internals.dtensors import local_of
from int8compile.torch_internals.fsdp import gathered_storages
from int8compile.torch_internals.tensors import is_fake, storage_key
from int8compile.weights.int8_weight import FloatWeight, Int8Weight
from int8compile.weights.stamps import unchanged_from_now
from int8compile.weights.store import Entry, WeightStore

_Unchanged = Callable[[list[torch.Tensor]], bool]


class LiftedInput(NamedTuple):
    """An int8 weight that a compiled graph takes: which of the graph's arguments it is made of.

    Args:
        sources: position of each float weight, and whether it is stored [K, N].
        release: called with each of them once the int8 form exists, to free its storage.
        gathered: whether FSDP gathers them, maybe before each call, into memory that looks the same and counts no
            write. Then they are quantised at each call, and no int8 form is kept.
        columns: features whose codes have 16 bits; the graph takes them, and the int8 weight in them, too.
    """

    sources: tuple[tuple[int, bool], ...]
    release: Callable[[torch.Tensor], None] | None = None
    gathered: bool = False
    columns: tuple[int, ...] = ()


class LiftedInputs:
    """All lifted inputs of one compiled graph, at each of its calls.

    As long as no weight has changed, which one check tells for all of them, they are what they were at the last call.
    That is only a shortcut past the store, and a weak one, so that no int8 form outlives its weight for its sake.

    Args:
        written: positions of the arguments that the graph writes to.
        sharded: positions of the weights that are DTensors.
    """

    def __init__(
        self,
        store: WeightStore,
        inputs: Sequence[LiftedInput],
        written: Sequence[int] = (),
        sharded: Sequence[int] = (),
    ) -> None:
        self._store, self._written = store, written
        starts = itertools.accumulate((4 if lifted.columns else 2 for lifted in inputs), initial=0)
        self._gathered = [(at, lifted) for at, lifted in zip(starts, inputs, strict=False) if lifted.gathered]
        inputs = self._inputs = [lifted for lifted in inputs if not lifted.gathered]
        self._positions = sorted({position for lifted in inputs for position, _ in lifted.sources})
        self._sharded = [position for position in self._positions if position in sharded]
        # Weights of which there are several int8 forms: all are made before the first frees the weight.
        taken = [source for lifted in inputs for source, _ in lifted.sources]
        self._several = [
            i for i, lifted in enumerate(inputs) if any(taken.count(source) > 1 for source, _ in lifted.sources)
        ]
        # Of the last call: whether weights are what they were, the entries, and the weights' storages.
        self._last: tuple[_Unchanged, list[tuple[weakref.ref[Entry], tuple[int, ...]]], set[int]] | None = None

    def fetch(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Int8 weight and scale of each lifted input, and what it has of columns, for the arguments as they are now.

        None if an argument that the graph writes to lies in a weight's memory: that weight changes in mid-call.
        """
        inputs = self._fetch(args)
        for at, lifted in self._gathered if inputs is not None else ():
            sources = [FloatWeight.of(args[position], transposed) for position, transposed in lifted.sources]
            if self._written and self._overlap(args, {storage_key(source.tensor) for source in sources}):
                return None
            inputs[at:at] = Entry(Int8Weight.joined(sources), ()).inputs(lifted.columns)  # type: ignore[index]
        return inputs

    def _fetch(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Of all that FSDP does not gather."""
        weights = self._watched(args)
        last = self._last  # read once: another thread may put a new one
        if last is None or not last[0](weights):
            return self._resolve(args, weights)
        if self._written and self._overlap(args, last[2]):
            return None
        inputs: list[torch.Tensor] = []
        for entry_of, columns in last[1]:
            entry = entry_of()
            if entry is None:
                return self._resolve(args, weights)
            inputs += entry.inputs(columns)
        return inputs

    def _watched(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The weights, and of a DTensor its shard too: a write counts of the one that it is made to."""
        weights = [args[position] for position in self._positions]
        return weights + [local_of(args[position]) for position in self._sharded]

    def _overlap(self, args: Sequence[torch.Tensor], storages: set[int]) -> bool:
        return any(storage_key(args[position]) in storages for position in self._written)

    def _resolve(self, args: Sequence[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor] | None:
        groups = [
            [FloatWeight.of(args[at], transposed) for at, transposed in lifted.sources] for lifted in self._inputs
        ]
        if not weights:
            return []
        first = local_of(weights[0])
        if is_fake(first):
            # DDPOptimizer calls each part once on fakes, to learn the strides of what the next part is given.
            with first.fake_mode:
                return [
                    tensor
                    for group, lifted in zip(groups, self._inputs, strict=True)
                    for tensor in Entry(Int8Weight.empty(group), ()).inputs(lifted.columns)
                ]
        storages = set(map(storage_key, weights))
        if self._overlap(args, storages):
            return None
        gathered = gathered_storages()
        if storages & gathered:  # of weights that a graph is given by another way than from FSDP's module
            self._last = None
            return [t for pair in zip(groups, self._inputs, strict=True) for t in self._beside(gathered, *pair)]
        unchanged = unchanged_from_now(weights)  # first: a change from here on is then seen
        for i in self._several:
            self._store.entry(groups[i])
        pairs = zip(groups, self._inputs, strict=True)
        entries = [self._store.entry(group, lifted.release) for group, lifted in pairs]
        columns = [lifted.columns for lifted in self._inputs]
        self._last = unchanged, [*zip(map(weakref.ref, entries), columns, strict=True)], storages
        return [t for entry, of in zip(entries, columns, strict=True) for t in entry.inputs(of)]

    def _beside(self, gathered: set[int], group: list[FloatWeight], lifted: LiftedInput) -> tuple[torch.Tensor, ...]:
        """One lifted input, where FSDP gathers some weights: it is quantised anew if one of its own is among them."""
        if any(storage_key(source.tensor) in gathered for source in group):
            return Entry(Int8Weight.joined(group), ()).inputs(lifted.columns)
        return self._store.entry(group).inputs(lifted.columns)
