"""What ``nn.Module`` keeps of hooks, the modules that ``torch.compile`` makes, and PyTorch's families of modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.dropout import _DropoutNd as Dropout
from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm

__all__ = ["BatchNorm", "Dropout", "InstanceNorm", "copy_contents", "share_hooks", "uncompiled"]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of another. Both have the same from then on, so a handle removes one from either."""
    for name in _HOOKS:
        vars(new)[name] = vars(old)[name]


def uncompiled(model: Any) -> Any:
    """The module or function that ``torch.compile`` has wrapped; anything else as it is."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def copy_contents(old: nn.Module, new: nn.Module, *, without: Collection[str]) -> None:
    """Give a module another's attributes, Parameters, buffers and children, the same objects, but none of its hooks.

    Args:
        without: names of those that it is not given.
    """
    hidden = {*vars(nn.Module()), "forward", "_hf_hook", "_old_forward", *without}
    vars(new).update({name: value for name, value in vars(old).items() if name not in hidden})
    for kind in ("_parameters", "_buffers", "_modules"):
        vars(new)[kind].update({name: value for name, value in vars(old)[kind].items() if name not in without})
    vars(new)["_non_persistent_buffers_set"].update(vars(old)["_non_persistent_buffers_set"])
