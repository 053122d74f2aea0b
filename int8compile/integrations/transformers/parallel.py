"""transformers' tensor parallelism of int8 modules: each process quantises the shard that it reads.

transformers gives every process its slice of each float weight. A row of a column-wise weight is whole in one process.
A row of a row-wise weight is in all of them, and has one scale, so the processes tell one another the largest
magnitudes of their slices. Codes and scales are then those of one process, to the bit, and saving gathers the same
files.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed, nn
from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

from int8compile.config import Int8Config
from int8compile.errors import OptionValueError
from int8compile.modules.find_experts import find_experts
from int8compile.modules.int8_linear import Int8Linear
from int8compile.report import Reason
from int8compile.torch_internals.dtensors import is_dtensor, local_of, shard_dim
from int8compile.weights.int8_weight import Int8Weight

_ROW_WISE = ("rowwise", "rowwise_rep", "rowwise_split_input")


def is_tensor_parallel(model: Any) -> bool:
    """Whether transformers is about to shard a model that is being loaded."""
    return (getattr(getattr(model.config, "distributed_config", None), "tp_size", None) or 1) > 1


def refused_experts(model: nn.Module, config: Int8Config) -> dict[str, tuple[Reason, str]]:
    """Experts, by their paths: their int8 modules do not shard. (The backend takes float ones on their shards.)"""
    paths = [path for found in find_experts(model, config) for path in found.paths]
    return dict.fromkeys(paths, (Reason.EXPERTS, "under tensor parallelism"))


def replicate_scales(model: nn.Module, plan: dict[str, str]) -> None:
    """Say in a plan that the scales of row-wise weights, one an output, are whole in each process."""
    int8 = {replace_layer_number_by_wildcard(path) for path, m in model.named_modules() if isinstance(m, Int8Linear)}
    for path, style in list(plan.items()):
        if path in int8 and style in _ROW_WISE:
            plan[f"{path}.weight_scale"] = "replicate"


def quantize_shard(shard: torch.Tensor, weight: Any) -> Int8Weight:
    """The int8 form of this process's slice of a float weight [N, K], with the scales of the whole rows.

    All processes of the mesh have to call it, for one weight after the other.

    Args:
        weight: a DTensor laid out as the slice is; its values do not matter.

    Raises:
        OptionValueError: a layout other than in rows or in columns.
    """
    if tuple(shard.shape) != tuple(local_of(weight).shape):
        expected = f"a plan whose shards are {list(local_of(weight).shape)}; the checkpoint gives {list(shard.shape)}"
        raise OptionValueError("tp_plan", list(weight.placements), expected)
    try:
        dims = [shard_dim(placement) for placement in weight.placements]
    except ValueError as error:
        raise OptionValueError("tp_plan", str(error), "colwise or rowwise for an int8 linear") from error
    groups = [weight.device_mesh.get_group(i) for i, dim in enumerate(dims) if dim == 1]
    if not groups:
        return Int8Weight.quantize(shard)
    largest = shard.abs().amax(1)
    for group in groups:
        parts = [torch.empty_like(largest) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(parts, largest, group)
        largest = torch.stack(parts).amax(0)  # which keeps NaN, as a reduction need not
    # The largest magnitude of the whole row, put beside the slice, gives the scale of the whole row.
    codes, weight_scale = Int8Weight.quantize(torch.cat((shard, largest.unsqueeze(1)), 1))
    return Int8Weight(codes[:, :-1].contiguous(), weight_scale)


def gathered(value: Any) -> Any:
    """A DTensor as a whole tensor, which all processes have to ask for; anything else as it is."""
    return value.full_tensor() if is_dtensor(value) else value
