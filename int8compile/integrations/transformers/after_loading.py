"""What follows when ``from_pretrained`` has read a checkpoint: what that lacked, and what cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from int8compile.errors import CheckpointError
from int8compile.integrations.transformers.experts import int8_weights
from int8compile.modules.int8_experts import Int8Experts
from int8compile.modules.int8_linear import Int8Linear
from int8compile.modules.places import carry_hooks, is_offloaded


def initialize_missing(model: Any, loaded: set[str]) -> None:
    """Linears that the checkpoint does not have (a new head) become float ones, initialised as the model does it.

    So do experts' weights, and the modules of experts that have no int8 weight then.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Experts):
            _initialize_experts(model, path, module, loaded)
        if not isinstance(module, Int8Linear) or path in loaded:
            continue
        device = module.weight.device if not module.weight.is_meta else torch.device("cpu")
        new = module.to_empty(device=device).to_float()
        carry_hooks(module, new)
        model.set_submodule(path, new)
        model._init_weights(new)


def _initialize_experts(model: Any, path: str, module: Int8Experts, loaded: set[str]) -> None:
    for name in [name for name in module.int8 if f"{path}.{name}" not in loaded]:
        module.dequantize_weight_(name)
    # The flag is transformers' own, on what a checkpoint has given; what is on the disk has none.
    own = module.named_parameters(recurse=False)
    new = [name for name, p in own if not (p.is_meta or getattr(p, "_is_hf_initialized", False))]
    if new and module.int8:
        problem = "is missing, or of another shape"
        raise CheckpointError(f"{path}.{new[0]}", problem, "it beside what there is of these experts")
    if not module.int8:
        as_float = module.to_float()
        carry_hooks(module, as_float)
        model.set_submodule(path, as_float)
        if new:
            model._init_weights(as_float)


def check_whole(model: Any) -> None:
    """Refuse experts whose processes each hold all of them, and of whose results the parallel plan takes the sum."""
    how = getattr(model.config, "distributed_config", None)
    split = [name for name in ("tp_size", "ep_size") if (getattr(how, name, None) or 1) > 1]
    if split and (key := next((key for key, *_ in int8_weights(model)), None)) is not None:
        raise ValueError(
            f"{split[0]}={getattr(how, split[0])} splits experts between processes, which int8 ones ({key}) are not: "
            "leave them in float by llm_int8_skip_modules=['experts'], or compile the float model with backend='int8'"
        )


def check_offload(model: nn.Module) -> None:
    for module in model.modules():
        hook: Any = getattr(module, "_hf_hook", None)
        if isinstance(module, (Int8Linear, Int8Experts)) and is_offloaded(module) and not hook.offload_buffers:
            raise ValueError(
                "device_map offloads int8 weights, which are buffers: pass offload_buffers=True to from_pretrained, "
                "or they would all be moved to the execution device"
            )
