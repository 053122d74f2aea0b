"""The hand-off to inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table


def option_names() -> list[str]:
    """The names of inductor's own options."""
    names: list[str] = list_options()
    return names


def mode_options(mode: str) -> dict[str, Any]:
    """The options that a ``mode`` of ``torch.compile`` stands for."""
    options: dict[str, Any] = list_mode_options(mode)
    return options


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    patches: Mapping[str, Any],
    bodies: Mapping[torch._ops.OpOverload, Callable[..., Any]],
    tag: str,
) -> Callable[..., Any]:
    """Compile a graph of Dynamo's kind.

    Args:
        patches: inductor's own options.
        bodies: operators that are compiled as what these functions do; all others stay calls.
        tag: what decides the result beside the graph and inductor's options, for the keys of inductor's caches.
    """
    decompositions = {**select_decomp_table(), **bodies} if bodies else None
    with in_cache_keys(tag):
        compiled: Any = compile_fx(gm, inputs, config_patches=dict(patches), decompositions=decompositions)
    function: Callable[..., Any] = compiled
    return function


def in_cache_keys(tag: str) -> Any:
    """Within the context: a text that is part of the keys of inductor's caches, after the one that is there already."""
    outer: str = torch.compiler.config.cache_key_tag
    return torch.compiler.config.patch(cache_key_tag=f"{outer} {tag}".strip())  # type: ignore[attr-defined]
