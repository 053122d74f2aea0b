"""The int8 backend with a cheap tail: the rewritten graph runs as it is instead of going through inductor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from int8compile.backend import compile_rewritten
from int8compile.config import Int8Config
from int8compile.ops import linear, quantize_weight


def compile_eager(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` with all of the int8 backend but inductor; nothing is too small.

    The result's ``graphs`` lists each rewritten graph.
    """
    config = Int8Config.make({"min_features": 0, **options})
    graphs: list[torch.fx.GraphModule] = []

    def tail(gm: torch.fx.GraphModule, inputs: Any, config: Int8Config, provider: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return compile_rewritten(gm, example_inputs, config, tail)

    compiled = torch.compile(model, backend=backend)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs)

    call.graphs = graphs  # type: ignore[attr-defined]
    return call


def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, threshold: float = 6.0
) -> torch.Tensor:
    """What a rewritten ``F.linear(x, weight, bias)`` must give, by the operators alone."""
    return linear(x, *quantize_weight(weight.detach()), bias, threshold)
