"""Graphs for pass tests: ``int8compile.testing``'s, with options by keyword and nothing too small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from int8compile import testing
from int8compile.graph.capture import Capture
from int8compile.graph.dump import dump
from int8compile.passes import PassContext


def rewrite(
    module: torch.nn.Module,
    *args: torch.Tensor,
    upto: str | None = None,
    dynamic: bool = False,
    grad: bool = False,
    edit: Callable[[Capture], None] | None = None,
    **options: object,
) -> tuple[Capture, PassContext]:
    """Trace and run the pipeline up to and including the pass named ``upto``."""
    config = {"min_features": 0, **options}
    return testing.rewrite(module, *args, upto=upto, dynamic=dynamic, grad=grad, edit=edit, config=config)


def golden(module: torch.nn.Module, *args: torch.Tensor, **kwargs: Any) -> str:
    """The text of the graph that ``rewrite`` gives."""
    return dump(rewrite(module, *args, **kwargs)[0].graph)
