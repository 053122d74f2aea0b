"""The int8 form of a float weight: how one is made, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from int8compile.ops import quantize_weight

_CHUNK = 1 << 20  # elements quantised at a time, so that fp32 temporaries stay small


class FloatWeight(NamedTuple):
    """A linear's float weight: a tensor [N, K], or [K, N] if ``transposed``."""

    tensor: torch.Tensor
    transposed: bool = False

    @property
    def rows(self) -> int:
        """N, the output channels."""
        return self.tensor.shape[1 if self.transposed else 0]

    @property
    def columns(self) -> int:
        """K, the input features."""
        return self.tensor.shape[0 if self.transposed else 1]


class Int8Weight(NamedTuple):
    """An int8 weight [N, K], row-major, and its fp32 scale [N]."""

    weight: torch.Tensor
    weight_scale: torch.Tensor

    @classmethod
    def quantize(cls, tensor: torch.Tensor, transposed: bool = False) -> Int8Weight:
        """That of a float weight [N, K] ([K, N] if ``transposed``), held by the caller and not by the store."""
        member = FloatWeight(tensor, transposed)
        made = cls.empty([member])
        made.fill(member)
        return made

    @classmethod
    def empty(cls, members: Sequence[FloatWeight]) -> Int8Weight:
        """Memory for the rows of float weights of the same K, one below the other, on the device of the first."""
        rows, columns = sum(member.rows for member in members), members[0].columns
        device = members[0].tensor.device
        # Made outside inference mode, so that a later call with gradients can save them for backward.
        with torch.inference_mode(False):
            return cls(
                torch.empty((rows, columns), dtype=torch.int8, device=device),
                torch.empty((rows,), dtype=torch.float32, device=device),
            )

    def rows(self, start: int, count: int) -> Int8Weight:
        """Some of the rows, as views."""
        return Int8Weight(self.weight[start : start + count], self.weight_scale[start : start + count])

    def fill(self, member: FloatWeight) -> None:
        """Quantise a float weight of as many rows into this memory."""
        with torch.no_grad():
            tensor = member.tensor.detach()
            tensor = tensor.t() if member.transposed else tensor
            step = max(1, _CHUNK // max(1, tensor.shape[1]))
            for start in range(0, tensor.shape[0], step):
                codes, weight_scale = quantize_weight(tensor[start : start + step])
                self.weight[start : start + step].copy_(codes)
                self.weight_scale[start : start + step].copy_(weight_scale)

    def dequantize(self, dtype: torch.dtype, transposed: bool = False) -> torch.Tensor:
        """The float weight [N, K] ([K, N] if ``transposed``) that the codes stand for."""
        tensor = (self.weight.float() * self.weight_scale.unsqueeze(1)).to(dtype)
        return tensor.t().contiguous() if transposed else tensor
