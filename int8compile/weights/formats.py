"""Checkpoint formats: the names and shapes of an int8 linear's weight and scale in each.

==================== ============================ ==================================== =======================
format               weight, int8 [N, K]          scale                                read by
==================== ============================ ==================================== =======================
int8compile          ``weight``                   ``weight_scale``, fp32 [N]           this package
bitsandbytes         ``weight``                   ``SCB``, fp32 [N], 127 * scale;      bitsandbytes, this package
                                                  ``weight_format``, 0
compressed-tensors   ``weight``                   ``weight_scale``, fp32 [N, 1]        vLLM, SGLang
==================== ============================ ==================================== =======================

In each, codes are row-major [N, K], GPT-2's Conv1D included, and nothing is requantised from one to another. Experts
are linears of their own in it, or in the format ``int8compile`` one weight [E, N, K] with its scale [E, N], as the
float checkpoint has them; bitsandbytes has no int8 form for them.

A program that does not know the format ``int8compile`` would take codes for floats. So that it fails instead, the first
int8 weight of such a checkpoint has one dimension more, [N, K, 1], which fits no float weight.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from int8compile.errors import CheckpointError, OptionValueError
from int8compile.weights.int8_weight import Int8Weight

FORMATS = ("int8compile", "bitsandbytes", "compressed-tensors")

#: what the name of experts' weights is followed by in that of their scales
SCALE = "_scale"

#: names of the entries that one int8 weight can have, in any of the formats we read
SERIALIZED = ("weight", "weight_scale", "SCB", "weight_format")


def entries(int8_weight: Int8Weight, format: str) -> dict[str, torch.Tensor]:
    """The entries of one int8 linear in a format, by their names in the module."""
    weight, weight_scale = int8_weight
    if format == "int8compile":
        return {"weight": weight, "weight_scale": weight_scale}
    if format == "compressed-tensors":
        return {"weight": weight, "weight_scale": weight_scale.unsqueeze(1)}
    if format == "bitsandbytes":
        layout = torch.zeros((), dtype=torch.uint8, device=weight.device)
        return {"weight": weight, "SCB": absmax_of(weight_scale), "weight_format": layout}
    raise OptionValueError("format", format, "one of " + ", ".join(map(repr, FORMATS)))


def read_int8_weight(found: dict[str, torch.Tensor], prefix: str, shape: Iterable[int]) -> Int8Weight | None:
    """The int8 form in a checkpoint's entries for one linear, not copied; None if there are none.

    Args:
        found: those of ``SERIALIZED`` that are there.
        prefix: of their names in the checkpoint, for messages.
        shape: what the model expects of the weight, [N, K].

    Raises:
        CheckpointError: they are not an int8 weight and its scale.
    """
    if not found:
        return None
    layout, weight, shape = found.get("weight_format"), found.get("weight"), tuple(shape)
    if layout is not None and int(layout) != 0:
        problem = f"is {int(layout)}, a layout of old bitsandbytes"
        raise CheckpointError(f"{prefix}weight_format", problem, "0 (row-major)")
    if weight is None or weight.dtype != torch.int8:
        problem = "is missing" if weight is None else f"is {weight.dtype}"
        raise CheckpointError(f"{prefix}weight", problem, "int8; quantise a float checkpoint after it is loaded")
    if tuple(weight.shape) == (*shape, 1):
        weight = weight.squeeze(2)
    if tuple(weight.shape) != shape:
        problem = f"is int8 {list(weight.shape)}"
        raise CheckpointError(f"{prefix}weight", problem, f"{list(shape)}, as the model has it")
    name = "SCB" if "SCB" in found else "weight_scale"
    scale = found.get(name)
    if scale is None:
        problem = f"is missing beside the int8 {prefix}weight"
        raise CheckpointError(f"{prefix}weight_scale", problem, "it, or bitsandbytes' SCB")
    known = scale.is_floating_point() if name == "SCB" else scale.dtype == torch.float32
    if not known or tuple(scale.shape) != shape[:1]:
        problem = f"is {scale.dtype} {list(scale.shape)}"
        raise CheckpointError(f"{prefix}{name}", problem, f"float32 {list(shape[:1])}")
    # Who cast a bitsandbytes model before saving it has its SCB in 16 bits.
    return Int8Weight(weight, scale.float() / 127.0 if name == "SCB" else scale)


def read_experts_weight(
    weight: torch.Tensor | None, weight_scale: torch.Tensor | None, name: str, shape: Iterable[int]
) -> Int8Weight | None:
    """The int8 form in a checkpoint's entries for one weight of several experts, not copied; None if there are none.

    Args:
        weight, weight_scale: the entries of that name, and of that name with ``SCALE``; None if they are missing.
        name: for messages.
        shape: what the model expects of the weight, [E, N, K].

    Raises:
        CheckpointError: they are not an int8 weight and its scale.
    """
    if weight is None and weight_scale is None:
        return None
    shape = tuple(shape)
    if weight is None or weight.dtype != torch.int8:
        problem = "is missing" if weight is None else f"is {weight.dtype}"
        raise CheckpointError(name, problem, "int8; quantise a float checkpoint after it is loaded")
    if tuple(weight.shape) == (*shape, 1):
        weight = weight.squeeze(3)
    if tuple(weight.shape) != shape:
        raise CheckpointError(name, f"is int8 {list(weight.shape)}", f"{list(shape)}, as the model has it")
    if weight_scale is None:
        raise CheckpointError(name + SCALE, f"is missing beside the int8 {name}", "it")
    if weight_scale.dtype != torch.float32 or tuple(weight_scale.shape) != shape[:2]:
        problem = f"is {weight_scale.dtype} {list(weight_scale.shape)}"
        raise CheckpointError(name + SCALE, problem, f"float32 {list(shape[:2])}")
    return Int8Weight(weight, weight_scale)


def absmax_of(weight_scale: torch.Tensor) -> torch.Tensor:
    """The absmax whose 127th is a weight's scale, to the bit: ``weight_scale * 127`` or one of its neighbours.

    Where two have the same 127th it is the even one: absmaxes of 16-bit weights, which bitsandbytes' all are, end in
    zeros, and so come back as they were.
    """
    product = weight_scale * 127.0
    best, best_rank = product, torch.zeros_like(product, dtype=torch.int32)
    for limit in (None, float("inf"), float("-inf")):
        candidate = product if limit is None else torch.nextafter(product, torch.full_like(weight_scale, limit))
        even = candidate.view(torch.int32) % 2 == 0
        rank = (candidate / 127.0 == weight_scale) * torch.where(even, 2, 1)
        best, best_rank = torch.where(rank > best_rank, candidate, best), torch.maximum(rank, best_rank)
    return best


def mark(weight: torch.Tensor) -> torch.Tensor:
    """The first int8 weight of a checkpoint, so that it is taken for no float one."""
    return weight.unsqueeze(-1)
