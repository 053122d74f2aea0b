"""The weight store: gives the int8 form of a float weight, made once and anew when the weight has changed.

A form is kept as long as its weight is what it was (``stamps``, which see nearly every change); otherwise the weight is
quantised again. Entries die with their weights.

Weights that one product multiplies together (``passes/merge.py``) are *one* int8 matrix here. The int8 form of each
of them alone is a view into it.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch

from int8compile.torch_internals.tensors import storage_key
from int8compile.weights.int8_weight import FloatWeight, Int8Weight
from int8compile.weights.stamps import Stamp

_Key = tuple[tuple[int, bool], ...]  # of each float weight its id, and whether it is transposed


@dataclasses.dataclass
class Entry:
    """The int8 form of some float weights, and what they looked like."""

    int8_weight: Int8Weight
    stamps: tuple[Stamp, ...]
    release_done: bool = False
    #: columns -> themselves as a tensor, and the int8 weight in them
    in_columns: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def inputs(self, columns: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """What a graph takes of it: weight, scale and, if there are any, columns and the weight in them."""
        if not columns:
            return self.int8_weight
        found = self.in_columns.get(columns)
        if found is None:
            found = self.in_columns[columns] = self.int8_weight.in_columns(columns)
        return (*self.int8_weight, *found)

    def matches(self, sources: Sequence[FloatWeight]) -> bool:
        """Whether these are the same float weights, unchanged."""
        for stamp, source in zip(self.stamps, sources, strict=True):  # (all() is slower, each call)
            if not stamp.matches(source.tensor, source.whole):
                return False
        return True


class WeightStore:
    """Thread-safe map from float weights to their int8 form."""

    def __init__(self) -> None:
        self._entries: dict[_Key, Entry] = {}
        self._lock = threading.RLock()

    def resolve(
        self, sources: Sequence[FloatWeight], release: Callable[[torch.Tensor], None] | None = None
    ) -> Int8Weight:
        """The int8 form of the sources' rows, one below the other: int8 [sum of N, K] and fp32 [sum of N].

        Args:
            sources: float weights of the same K.
            release: called with each weight once its int8 form exists, to free its storage.
        """
        return self.entry(sources, release).int8_weight

    def entry(self, sources: Sequence[FloatWeight], release: Callable[[torch.Tensor], None] | None = None) -> Entry:
        """``resolve``, with what tells whether the answer still holds."""
        key = tuple((id(source.tensor), source.transposed) for source in sources)
        entry = self._entries.get(key)
        if entry is not None and entry.matches(sources) and (release is None or entry.release_done):
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.matches(sources):
                entry = self._quantize(key, sources)
            if release is not None:
                self._release(entry, sources, release)
            return entry

    def invalidate(self, weights: Iterable[torch.Tensor]) -> None:
        """Forget the int8 form of weights that changed unseen (a fused optimiser bumps no version)."""
        changed = {id(weight) for weight in weights}  # an entry's own weights live, or it would be gone
        with self._lock:
            for key, entry in list(self._entries.items()):
                if any(id_ in changed and not s.released for (id_, _), s in zip(key, entry.stamps, strict=True)):
                    self._entries.pop(key, None)

    def clear(self) -> None:
        """Forget everything but what has no float weight left to come back from."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                if not any(stamp.released for stamp in entry.stamps):
                    self._entries.pop(key, None)

    def released(self, weight: torch.Tensor) -> tuple[Int8Weight, bool] | None:
        """The int8 form of a released weight, and whether the float one is transposed; None if it was not released."""
        with self._lock:
            for key, entry in list(self._entries.items()):
                # Merged weights have an entry of their own as well, so single ones are enough.
                if len(key) == 1 and entry.stamps[0].released and entry.stamps[0].matches(weight):
                    return entry.int8_weight, key[0][1]
        return None

    def nbytes(self) -> int:
        """Bytes held, each storage counted once."""
        with self._lock:
            entries = list(self._entries.values())
            tensors = [t for entry in entries for t in entry.int8_weight]
            tensors += [t for entry in entries for found in list(entry.in_columns.values()) for t in found]
            return sum({storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _quantize(self, key: _Key, sources: Sequence[FloatWeight]) -> Entry:
        parts = [self._known_part(source) for source in sources]
        int8_weight = Int8Weight.empty(sources)
        start = 0
        for source, part in zip(sources, parts, strict=True):
            target = int8_weight.rows(start, source.rows)
            if part is None:
                target.fill(source)
            else:
                target.weight.copy_(part.int8_weight.weight)
                target.weight_scale.copy_(part.int8_weight.weight_scale)
            start += source.rows
        stamps = tuple(
            part.stamps[0] if part is not None else self._stamp(source)
            for source, part in zip(sources, parts, strict=True)
        )
        entry = self._entries[key] = Entry(int8_weight, stamps)
        self._make_views(key, entry, sources)
        return entry

    def _known_part(self, source: FloatWeight) -> Entry | None:
        """The source alone, if it is here and current."""
        entry = self._entries.get(((id(source.tensor), source.transposed),))
        return entry if entry is not None and entry.matches([source]) else None

    def _stamp(self, source: FloatWeight) -> Stamp:
        """One for both orders in which a weight may be read: once it is released, it is so in either."""
        other = self._entries.get(((id(source.tensor), not source.transposed),))
        if other is not None and other.stamps[0].matches(source.tensor, source.whole):
            return other.stamps[0]
        return Stamp(source.tensor, self._forgetter(id(source.tensor)), source.whole)

    def _make_views(self, key: _Key, entry: Entry, sources: Sequence[FloatWeight]) -> None:
        """Point each source's own entry at its rows of the merged matrix, so that nothing is held twice."""
        if len(sources) == 1:
            return
        start = 0
        for part, stamp, source in zip(key, entry.stamps, sources, strict=True):
            self._entries[(part,)] = Entry(entry.int8_weight.rows(start, source.rows), (stamp,))
            start += source.rows

    def _forgetter(self, weight: int) -> Callable[[], None]:
        store = weakref.ref(self)

        def forget() -> None:
            alive = store()
            if alive is not None:
                with alive._lock:
                    # (A list first: what dies while this goes on, by a garbage collection, changes the dict.)
                    for key in [k for k in list(alive._entries) if any(weight == id_ for id_, _ in k)]:
                        alive._entries.pop(key, None)

        return forget

    def _release(self, entry: Entry, sources: Sequence[FloatWeight], release: Callable[[torch.Tensor], None]) -> None:
        for stamp, source in zip(entry.stamps, sources, strict=True):
            if not stamp.released and owns_storage(source.tensor):
                release(source.tensor)
                stamp.released = True
        entry.release_done = True


def owns_storage(weight: torch.Tensor) -> bool:
    """Whether a tensor is all there is in its storage, so that freeing it takes nothing from another."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


STORE = WeightStore()
