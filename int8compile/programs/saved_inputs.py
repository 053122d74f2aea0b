"""Shapes and dtypes of a program's example inputs, as its file holds them."""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch.utils import _pytree as pytree

_DTYPES = {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, torch.dtype)}


def described(program: torch.export.ExportedProgram) -> list[Any] | None:
    """Each example input as [dtype, shape, device] or the plain value it is; None if one is neither, or none fits."""
    found: list[Any] = []
    for value in pytree.tree_leaves(program.example_inputs):
        if isinstance(value, torch.Tensor):
            found.append([str(value.dtype).removeprefix("torch."), list(value.shape), str(value.device)])
        elif value is None or isinstance(value, (bool, int, float, str)):
            found.append(value)
        else:
            return None
    fits = program.example_inputs is not None and len(found) == program.call_spec.in_spec.num_leaves
    return found if fits else None


def zeros(saved: Any, program: torch.export.ExportedProgram) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Example inputs as ``described`` saw them, all zeros.

    Raises:
        ValueError, RuntimeError, OSError: they are none, or not of this program.
    """
    if saved is None:
        return None
    if type(saved) is not list:
        raise ValueError(f"example_inputs are {saved!r:.80}")
    leaves = [_zeros(*_tensor(value)) if isinstance(value, (list, dict)) else value for value in saved]
    inputs: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return inputs


def _tensor(saved: Any) -> tuple[torch.dtype, list[int], torch.device]:
    if type(saved) is list and len(saved) == 3:
        dtype, shape, device = saved
        sizes = type(shape) is list and all(type(size) is int and size >= 0 for size in shape)
        if sizes and type(dtype) is str and dtype in _DTYPES and type(device) is str:
            return _DTYPES[dtype], shape, torch.device(device)
    raise ValueError(f"an example input is {saved!r:.80}; expected [dtype, shape, device]")


def _zeros(dtype: torch.dtype, shape: list[int], device: torch.device) -> torch.Tensor:
    """Of memory that is there only once it is read, so that a file cannot ask for more than there is by a number."""
    size = math.prod(shape) * dtype.itemsize
    if size == 0 or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).reshape(shape)
