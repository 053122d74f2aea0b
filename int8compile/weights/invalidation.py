"""Requests to the weight store: quantise a weight again, or bring a freed weight back."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from int8compile.torch_internals.dtensors import local_of
from int8compile.weights.store import STORE


def invalidate(weights: torch.nn.Module | torch.Tensor) -> None:
    """Requantise at the next call. Needed only after changes that PyTorch does not count, as ``w.data.copy_(...)``:
    on a GPU; on a CPU only if they leave most of the weight as it was.

    Args:
        weights: a module, for all its parameters and buffers, or one tensor.
    """
    STORE.invalidate(_tensors(weights))


@functools.cache
def watch_optimizers() -> None:
    """From here on, requantise what an optimiser has stepped: fused ones change weights without PyTorch counting it."""
    register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    STORE.invalidate(local_of(weight) for weight in weights if weight.grad is not None)


def restore_weights_(weights: torch.nn.Module | torch.Tensor) -> int:
    """Give float weights that ``release_weights=True`` freed their storage back, with the values of their int8 form.

    The originals are gone: each value comes back within half a step of its channel's scale.

    Args:
        weights: a module or one tensor, changed in place.

    Returns:
        how many weights were restored.
    """
    count = 0
    for tensor in _tensors(weights):
        found = STORE.released(tensor)
        if found is None:
            continue
        int8_weight, transposed = found
        tensor.data = int8_weight.dequantize(tensor.dtype, transposed)
        count += 1
    return count


def _tensors(weights: torch.nn.Module | torch.Tensor) -> Iterator[torch.Tensor]:
    if isinstance(weights, torch.Tensor):
        return iter((local_of(weights),))
    if isinstance(weights, torch.nn.Module):
        return map(local_of, itertools.chain(weights.parameters(), weights.buffers()))
    raise TypeError(f"weights is {type(weights).__name__}; expected a torch.nn.Module or a tensor")
