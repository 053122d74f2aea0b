"""Where modules stand in a model, and putting others in their places."""

from __future__ import annotations

import sys

from torch import nn

from int8compile.torch_internals.modules import share_hooks


def by_identity(
    model: nn.Module, types: type[nn.Module] | tuple[type[nn.Module], ...]
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Modules of some types, each once, with every path it stands at."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, types):
            found.setdefault(id(module), (module, []))[1].append(path)
    return [(module, tuple(paths)) for module, paths in found.values()]


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere between calls, and only empty ones in it."""
    return bool(getattr(getattr(module, "_hf_hook", None), "offload", False))


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """What was hooked to a module goes on with the one in its place; accelerate's moving between devices too."""
    share_hooks(old, new)
    if hasattr(old, "_hf_hook") and not is_offloaded(old):
        sys.modules["accelerate.hooks"].add_hook_to_module(new, old._hf_hook)


def replace(model: nn.Module, paths: tuple[str, ...], old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that stands, with its hooks."""
    carry_hooks(old, new)
    for path in paths:
        model.set_submodule(path, new)
