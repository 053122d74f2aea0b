"""The int8 form of a float weight: how one is made, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from int8compile.ops import quantize_weight
from int8compile.torch_internals.dtensors import local_of

_CHUNK = 1 << 20  # elements quantised at a time, so that fp32 temporaries stay small


class FloatWeight(NamedTuple):
    """A linear's float weight: a tensor [N, K], or [K, N] if ``transposed``.

    Experts' weights have their number in front: [E, N, K], or [E, K, N] if ``transposed``. Of a DTensor ``tensor`` is
    this process's shard, and ``whole`` the DTensor.
    """

    tensor: torch.Tensor
    transposed: bool = False
    whole: torch.Tensor | None = None

    @classmethod
    def of(cls, tensor: torch.Tensor, transposed: bool = False) -> FloatWeight:
        """Of a plain tensor, or of the shard of a DTensor."""
        local = local_of(tensor)
        return cls(local, transposed, None if local is tensor else tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of its int8 form: [N, K] or [E, N, K]."""
        *front, first, last = self.tensor.shape
        return (*front, last, first) if self.transposed else (*front, first, last)

    @property
    def rows(self) -> int:
        """N, the output channels; of experts, E."""
        return self.shape[0]


class Int8Weight(NamedTuple):
    """An int8 weight [N, K], row-major, and its fp32 scale [N]; of experts [E, N, K] and [E, N]."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    @classmethod
    def quantize(cls, tensor: torch.Tensor, transposed: bool = False) -> Int8Weight:
        """That of a float weight [..., N, K] ([..., K, N] if ``transposed``), held by the caller, not by the store."""
        return cls.joined([FloatWeight(tensor, transposed)])

    @classmethod
    def empty(cls, sources: Sequence[FloatWeight]) -> Int8Weight:
        """Memory for the rows of float weights of the same K, one below the other, on the device of the first."""
        shape = (sum(source.rows for source in sources), *sources[0].shape[1:])
        return cls.of_shape(shape, sources[0].tensor.device)

    @classmethod
    def of_shape(cls, shape: Sequence[int], device: torch.device) -> Int8Weight:
        """Memory for codes of a shape, [N, K] or [E, N, K], and their scales."""
        # Made outside inference mode, so that a later call with gradients can save them for backward.
        with torch.inference_mode(False):
            return cls(
                torch.empty(tuple(shape), dtype=torch.int8, device=device),
                torch.empty(tuple(shape)[:-1], dtype=torch.float32, device=device),
            )

    @classmethod
    def joined(cls, sources: Sequence[FloatWeight]) -> Int8Weight:
        """That of float weights of the same K, one below the other, held by the caller."""
        made, start = cls.empty(sources), 0
        for source in sources:
            made.rows(start, source.rows).fill(source)
            start += source.rows
        return made

    def rows(self, start: int, count: int) -> Int8Weight:
        """Some of the rows, as views."""
        return Int8Weight(self.weight[start : start + count], self.weight_scale[start : start + count])

    def in_columns(self, columns: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns as int32 [C] beside the weight, and the weight in them, int8 [N, C]."""
        with torch.inference_mode(False), torch.no_grad():
            numbers = torch.tensor(columns, dtype=torch.int32, device=self.weight.device)
            return numbers, self.weight.index_select(1, numbers)

    def fill(self, source: FloatWeight) -> None:
        """Quantise a float weight of as many rows into this memory."""
        with torch.no_grad():
            tensor = source.tensor.detach()
            if tensor.dim() > 2:
                for expert, part in enumerate(tensor):
                    Int8Weight(self.weight[expert], self.weight_scale[expert]).fill(
                        FloatWeight(part, source.transposed)
                    )
                return
            tensor = tensor.t() if source.transposed else tensor
            step = max(1, _CHUNK // max(1, tensor.shape[1]))
            for start in range(0, tensor.shape[0], step):
                codes, weight_scale = quantize_weight(tensor[start : start + step])
                self.weight[start : start + step].copy_(codes)
                self.weight_scale[start : start + step].copy_(weight_scale)

    def dequantize(self, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
        """The float weight [..., N, K] ([..., K, N] if ``transposed``) that the codes stand for."""
        tensor = (self.weight.float() * self.weight_scale.unsqueeze(-1)).to(dtype)
        return tensor.mT.contiguous() if transposed else tensor
