"""What a float weight looked like when it was quantised, which tells whether its int8 form still holds.

It does as long as the weight is the same object with the same version counter, data pointer, shape, strides, dtype and
(living) storage. Some writes bump no version counter: ``weight.data.copy_()`` as EMA copies have it,
``weight.data += delta`` as merged adapters do, fused optimisers, anything to a tensor made in inference mode. Most of
them rewrite the whole weight, so on CPUs a few of its bytes are compared too; optimisers' steps are also reported by a
hook (``invalidation.py``).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from int8compile.native import loader
from int8compile.torch_internals.tensors import storage_expired, storage_key

_SAMPLES, _SAMPLE_BYTES = 2, 64


class Stamp:
    """What one weight looks like now. Keeps neither it nor its memory alive.

    Args:
        weight: on any device.
        on_death: called when the weight is gone.
        whole: the DTensor whose shard the weight is. A write to the DTensor counts there, and not of the shard.
    """

    __slots__ = ("form", "pointer", "ref", "released", "sample", "storage", "version", "whole")

    def __init__(
        self, weight: torch.Tensor, on_death: Callable[[], None] | None = None, whole: torch.Tensor | None = None
    ) -> None:
        self.ref = weakref.ref(weight, None if on_death is None else lambda _: on_death())
        self.whole = None if whole is None else (weakref.ref(whole), _version(whole))
        self.sample = _sample(weight)
        self.version = _version(weight)
        self.pointer = weight.data_ptr()
        self.form = _form(weight)
        # Memory freed and allocated anew can have the same address; the storage it was is then expired.
        self.storage = StorageWeakRef(weight.untyped_storage())
        self.released = False  # set by who frees the storage: its bytes cannot be looked at any more

    def matches(self, weight: torch.Tensor, whole: torch.Tensor | None = None) -> bool:
        """Whether this is the same weight, unchanged, of the same DTensor."""
        if self.ref() is not weight:
            return False
        if self.released:
            return bool(storage_key(weight) == self.storage.cdata)
        return (
            self._is_shard_of(whole)
            and (self.version is None or weight._version == self.version)
            and weight.data_ptr() == self.pointer
            and _form(weight) == self.form
            and not storage_expired(self.storage.cdata)
            and _sample(weight) == self.sample
        )

    def _is_shard_of(self, whole: torch.Tensor | None) -> bool:
        if self.whole is None or whole is None:
            return self.whole is None and whole is None
        ref, version = self.whole
        return ref() is whole and _version(whole) == version


def unchanged_from_now(weights: list[torch.Tensor]) -> Callable[[list[torch.Tensor]], bool]:
    """A function that tells whether weights are these ones, as they are now.

    Of csrc/common/stamps.cpp, if it is built: one call for all the weights of a graph.
    """
    native = loader.stamps(weights)
    if native is not None:
        match: Callable[[list[torch.Tensor]], bool] = native.match
        return match
    stamps = [Stamp(weight) for weight in weights]

    def unchanged(weights: list[torch.Tensor]) -> bool:
        return all(stamp.matches(weight) for stamp, weight in zip(stamps, weights, strict=True))

    return unchanged


def _version(weight: torch.Tensor) -> int | None:
    """None for a tensor made in inference mode, which counts nothing."""
    return None if weight.is_inference() else weight._version


def _form(weight: torch.Tensor) -> tuple[object, ...]:
    """How a weight's memory is read: ``weight.data = weight.data.t()`` changes nothing else."""
    return weight.dtype, weight.shape, weight.stride()


def _sample(weight: torch.Tensor) -> bytes:
    """Two cache lines of a weight's memory. Empty where there is no telling: on GPUs, which would have to be waited
    for, and where a weight's memory is not in one piece.
    """
    size = weight.numel() * weight.element_size()
    if weight.device.type != "cpu" or size == 0 or not _is_in_one_piece(weight) or weight.data_ptr() == 0:
        return b""
    starts = [size * (2 * i + 1) // (2 * _SAMPLES) for i in range(_SAMPLES)]
    return b"".join(ctypes.string_at(weight.data_ptr() + s, min(_SAMPLE_BYTES, size - s)) for s in starts)


def _is_in_one_piece(weight: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, in whatever order of the dimensions."""
    filled = 1
    for stride, size in sorted(zip(weight.stride(), weight.shape, strict=True)):
        if size != 1 and stride != filled:
            return False
        filled *= size
    return True
