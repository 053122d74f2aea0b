"""Memory that FSDP gathers weights into, maybe before each call, at the same address and without counting a write."""

from __future__ import annotations

import sys
from typing import Any

import torch

from int8compile.torch_internals.tensors import storage_key


def gathered_storages() -> set[int]:
    """Keys of the storages of all weights that FSDP2 has gathered; empty where no module is sharded."""
    if "torch.distributed.fsdp" not in sys.modules:
        return set()
    states = list(sys.modules["torch.distributed._composable_state"]._module_state_mapping.values())
    found: set[int] = set()
    for state in {id(ref()): ref() for ref in states}.values():
        for group in _groups(state):
            for of_weight in group.fsdp_params:
                weight = getattr(of_weight, "_unsharded_param", None)  # none before it is gathered first
                if isinstance(weight, torch.Tensor):
                    found.add(storage_key(weight))
    return found


def _groups(state: Any) -> list[Any]:
    """The groups of weights that a module's state gathers together; newer torch has several."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
