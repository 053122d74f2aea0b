"""The weight store: gives the int8 form of a float weight at each call, never stale and held once.

A compiled graph cannot hold int8 weights itself: two models of one class share one graph, and a weight can change
or be replaced without a recompile. So graphs take int8 weights as inputs, and the runner asks this store at each call.
The answer is at hand as long as the weight is the same object with the same version counter, data pointer and
(living) storage; anything else requantises. Some writes bump no version counter: ``weight.data.copy_()`` as EMA copies
have it, ``weight.data += delta`` as merged adapters do, fused optimisers, anything to a tensor made in inference mode.
They touch the whole weight, so a few of its bytes are compared too, where reading them costs nothing (on CPUs).
Entries die with their weights.

Weights that one product multiplies together (``passes/merge.py``) are *one* int8 matrix here. The int8 form of each
of them alone is a view into it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from int8compile.native import loader
from int8compile.ops import quantize_weight
from int8compile.torch_internals.operators import is_fake

_expired = torch.UntypedStorage._expired

_CHUNK = 1 << 20  # elements quantised at a time, so that fp32 temporaries stay small


class Packed(NamedTuple):
    """An int8 weight [N, K], row-major, and its fp32 scale [N]."""

    weight: torch.Tensor
    scale: torch.Tensor


def pack(weight: torch.Tensor, transposed: bool = False) -> Packed:
    """The int8 form of a float weight [N, K] ([K, N] if ``transposed``), held by the caller and not by the store."""
    member = Member(weight, transposed)
    packed = _empty([member])
    _quantize_into(packed, member)
    return packed


class Member(NamedTuple):
    """A float weight as part of a lifted input: [N, K], or [K, N] if ``transposed``."""

    weight: torch.Tensor
    transposed: bool

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """K, the input features."""
        return self.weight.shape[0 if self.transposed else 1]


_Key = tuple[tuple[int, bool], ...]


class _Stamp:
    """What a weight looked like when it was quantised."""

    __slots__ = ("pointer", "ref", "released", "sample", "storage", "version")

    def __init__(self, weight: torch.Tensor, on_death: Callable[[], None]) -> None:
        self.ref = weakref.ref(weight, lambda _: on_death())
        self.sample = _sample(weight)
        # Inference tensors have no version counter.
        self.version = None if weight.is_inference() else weight._version
        self.pointer = weight.data_ptr()
        # Memory freed and allocated anew can have the same address; the storage it was is then expired.
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.released = False

    def matches(self, weight: torch.Tensor) -> bool:
        if self.ref() is not weight:
            return False
        if self.released:
            return bool(weight.untyped_storage()._cdata == self.storage.cdata)
        return (
            (self.version is None or weight._version == self.version)
            and weight.data_ptr() == self.pointer
            and not _expired(self.storage.cdata)
            and _sample(weight) == self.sample
        )


_SAMPLES, _SAMPLE_BYTES = 2, 64


def _sample(weight: torch.Tensor) -> bytes:
    """Two cache lines of a weight's memory. Empty where there is no telling: on GPUs, which would have to be waited
    for, and where a weight's memory is not in one piece.
    """
    size = weight.numel() * weight.element_size()
    in_one_piece = weight.is_contiguous() or (weight.dim() == 2 and weight.t().is_contiguous())
    if weight.device.type != "cpu" or size == 0 or not in_one_piece or weight.data_ptr() == 0:
        return b""
    starts = [size * (2 * i + 1) // (2 * _SAMPLES) for i in range(_SAMPLES)]
    return b"".join(ctypes.string_at(weight.data_ptr() + s, min(_SAMPLE_BYTES, size - s)) for s in starts)


@dataclasses.dataclass
class _Entry:
    packed: Packed
    stamps: tuple[_Stamp, ...]
    release_done: bool = False

    def matches(self, members: Sequence[Member]) -> bool:
        for stamp, member in zip(self.stamps, members, strict=True):  # noqa: SIM110 (all() is slower, each call)
            if not stamp.matches(member.weight):
                return False
        return True


class WeightStore:
    """Thread-safe map from float weights to their int8 form."""

    def __init__(self) -> None:
        self._entries: dict[_Key, _Entry] = {}
        self._lock = threading.RLock()

    def resolve(self, members: Sequence[Member], release: Callable[[torch.Tensor], None] | None = None) -> Packed:
        """The int8 form of the members' rows, one below the other: int8 [sum of N, K] and fp32 [sum of N].

        Args:
            members: float weights of the same K.
            release: called with each weight once its int8 form exists, to free its storage.
        """
        return self.entry(members, release).packed

    def entry(self, members: Sequence[Member], release: Callable[[torch.Tensor], None] | None = None) -> _Entry:
        """``resolve``, with what tells whether the answer still holds."""
        key = tuple((id(m.weight), m.transposed) for m in members)
        entry = self._entries.get(key)
        if entry is not None and entry.matches(members) and (release is None or entry.release_done):
            return entry
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or not entry.matches(members):
                entry = self._pack(key, members)
            if release is not None:
                self._release(entry, members, release)
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

    def released(self, weight: torch.Tensor) -> tuple[Packed, bool] | None:
        """The int8 form of a released weight, and whether that is transposed; None if it was not released."""
        with self._lock:
            for key, entry in self._entries.items():
                # Merged weights have an entry of their own as well, so single ones are enough.
                if len(key) == 1 and entry.stamps[0].released and entry.stamps[0].matches(weight):
                    return entry.packed, key[0][1]
        return None

    def nbytes(self) -> int:
        """Bytes held, each storage counted once."""
        with self._lock:
            tensors = [t for entry in self._entries.values() for t in entry.packed]
            return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())

    def __len__(self) -> int:
        return len(self._entries)

    def _pack(self, key: _Key, members: Sequence[Member]) -> _Entry:
        parts = [self._known_part(m) for m in members]
        packed = _empty(members)
        start = 0
        for member, part in zip(members, parts, strict=True):
            target = _slice(packed, start, member.rows)
            if part is None:
                _quantize_into(target, member)
            else:
                target.weight.copy_(part.packed.weight)
                target.scale.copy_(part.packed.scale)
            start += member.rows
        stamps = tuple(
            part.stamps[0] if part is not None else _Stamp(m.weight, self._forgetter((id(m.weight), m.transposed)))
            for m, part in zip(members, parts, strict=True)
        )
        entry = self._entries[key] = _Entry(packed, stamps)
        self._make_views(key, entry, members)
        return entry

    def _known_part(self, member: Member) -> _Entry | None:
        """The member alone, if it is here and current."""
        entry = self._entries.get(((id(member.weight), member.transposed),))
        return entry if entry is not None and entry.matches([member]) else None

    def _make_views(self, key: _Key, entry: _Entry, members: Sequence[Member]) -> None:
        """Point each member's own entry at its rows of the merged matrix, so that nothing is held twice."""
        if len(members) == 1:
            return
        start = 0
        for part, stamp, member in zip(key, entry.stamps, members, strict=True):
            self._entries[(part,)] = _Entry(_slice(entry.packed, start, member.rows), (stamp,))
            start += member.rows

    def _forgetter(self, part: tuple[int, bool]) -> Callable[[], None]:
        store = weakref.ref(self)

        def forget() -> None:
            alive = store()
            if alive is not None:
                with alive._lock:
                    for key in [k for k in alive._entries if part in k]:
                        alive._entries.pop(key, None)

        return forget

    def _release(self, entry: _Entry, members: Sequence[Member], release: Callable[[torch.Tensor], None]) -> None:
        for stamp, member in zip(entry.stamps, members, strict=True):
            if not stamp.released and owns_storage(member.weight):
                release(member.weight)
                stamp.released = True
        entry.release_done = True


def owns_storage(weight: torch.Tensor) -> bool:
    """Whether a tensor is all there is in its storage, so that freeing it takes nothing from another."""
    return weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()


def _slice(packed: Packed, start: int, rows: int) -> Packed:
    return Packed(packed.weight[start : start + rows], packed.scale[start : start + rows])


def _empty(members: Sequence[Member]) -> Packed:
    rows, columns = sum(m.rows for m in members), members[0].columns
    device = members[0].weight.device
    # Made outside inference mode, so that a later call with gradients can save them for backward.
    with torch.inference_mode(False):
        return Packed(
            torch.empty((rows, columns), dtype=torch.int8, device=device),
            torch.empty((rows,), dtype=torch.float32, device=device),
        )


def _quantize_into(target: Packed, member: Member) -> None:
    with torch.no_grad():
        weight = member.weight.detach()
        weight = weight.t() if member.transposed else weight
        step = max(1, _CHUNK // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], step):
            codes, scale = quantize_weight(weight[start : start + step])
            target.weight[start : start + step].copy_(codes)
            target.scale[start : start + step].copy_(scale)


class Slot(NamedTuple):
    """A lifted input of one compiled graph: which of the graph's arguments it is made of."""

    members: tuple[tuple[int, bool], ...]  # position of each float weight, and whether it is stored [K, N]
    release: Callable[[torch.Tensor], None] | None = None


class Slots:
    """All lifted inputs of one compiled graph, at each of its calls.

    As long as no weight has changed, which one check tells for all of them, they are what they were at the last call.
    That is only a shortcut past the store, and a weak one, so that no int8 form outlives its weight for its sake.

    Args:
        written: positions of the arguments that the graph writes to.
    """

    def __init__(self, store: WeightStore, slots: Sequence[Slot], written: Sequence[int] = ()) -> None:
        self._store, self._slots, self._written = store, slots, written
        self._positions = sorted({position for slot in slots for position, _ in slot.members})
        self._last: tuple[_Stamps, list[weakref.ref[_Entry]], set[int]] | None = None

    def fetch(self, args: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Int8 weight and scale of each slot, for the arguments as they are now.

        None if an argument that the graph writes to lies in a weight's memory: that weight changes in mid-call.
        """
        weights = [args[position] for position in self._positions]
        last = self._last  # read once: another thread may put a new one
        if last is None or not last[0].match(weights):
            return self._resolve(args, weights)
        if self._written and self._overlap(args, last[2]):
            return None
        inputs: list[torch.Tensor] = []
        for entry_of in last[1]:
            entry = entry_of()
            if entry is None:
                return self._resolve(args, weights)
            inputs += entry.packed
        return inputs

    def _overlap(self, args: Sequence[torch.Tensor], storages: set[int]) -> bool:
        return any(args[position].untyped_storage()._cdata in storages for position in self._written)

    def _resolve(self, args: Sequence[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor] | None:
        members = [[Member(args[at], transposed) for at, transposed in slot.members] for slot in self._slots]
        if is_fake(weights[0]):
            # DDPOptimizer calls each part once on fakes, to learn the strides of what the next part is given.
            with weights[0].fake_mode:
                return [tensor for group in members for tensor in _empty(group)]
        storages = {weight.untyped_storage()._cdata for weight in weights}
        if self._overlap(args, storages):
            return None
        stamps = _stamps(weights)  # first: a change from here on is then seen
        slots = zip(members, self._slots, strict=True)
        entries = [self._store.entry(group, slot.release) for group, slot in slots]
        self._last = stamps, [weakref.ref(entry) for entry in entries], storages
        return [tensor for entry in entries for tensor in entry.packed]


class _Stamps(Protocol):
    """What weights looked like, and whether they still do."""

    def match(self, weights: list[torch.Tensor]) -> bool: ...


def _stamps(weights: list[torch.Tensor]) -> _Stamps:
    made: _Stamps | None = loader.stamps(weights)
    return _PythonStamps(weights) if made is None else made


class _PythonStamps:
    """Where there is no compiler; csrc/common/stamps.cpp does it with one call."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self._stamps = [_Stamp(weight, lambda: None) for weight in weights]

    def match(self, weights: list[torch.Tensor]) -> bool:
        return all(stamp.matches(weight) for stamp, weight in zip(self._stamps, weights, strict=True))


STORE = WeightStore()
