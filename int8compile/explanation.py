"""``explain``: what ``backend="int8"`` would do to a model, without compiling it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from int8compile.backend import rewrite
from int8compile.config import Int8Config
from int8compile.errors import CaptureError
from int8compile.graph.capture import Capture
from int8compile.native.providers import choose_provider
from int8compile.report import GraphReport, Report
from int8compile.torch_internals.modules import uncompiled


def explain(model: Callable[..., Any], *args: Any, options: object = None, **kwargs: Any) -> Report:
    """Run ``model(*args, **kwargs)`` once through the rewrites and report on every linear, graph and graph break.

    Nothing is compiled and nothing quantised: the graphs run as they were. Gradients count, as they do when
    compiling: outside ``torch.no_grad()`` a weight that requires one is TRAINABLE and stays in float.

    Args:
        model: a module or function, compiled by ``torch.compile`` or not.
        options: those of ``Int8Config``, as a dict, an ``Int8Config`` or a ``BitsAndBytesConfig``.

    Returns:
        a ``Report``: ``print()`` it for a table, ``to_json()`` it for a machine.

    Raises:
        CaptureError: the model is not callable.
        OptionNameError, OptionValueError: bad options.
    """
    report = Report()
    each_graph(model, args, kwargs, options, lambda captured, graph: report.add(graph))
    return report


def each_graph(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: object,
    look: Callable[[Capture, GraphReport], None],
) -> None:
    """Run a model once and look at each of its graphs as ``backend="int8"`` would rewrite it; raises as ``explain``."""
    if not callable(model):
        raise CaptureError(f"explain(model, ...): model is {type(model).__name__}, expected a module or function")
    config = Int8Config.make(options)

    def rewritten(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        look(*rewrite(gm, example_inputs, config, choose_provider(config.kernels, example_inputs)))
        return gm.forward

    original = uncompiled(model)

    # A frame of its own, so that the user's frames keep their compile caches and recompile counts wherever
    # nothing breaks the graph.
    def call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return original(*args, **kwargs)

    call.__code__ = call.__code__.replace(co_name=f"explain_{id(call):x}")
    torch.compile(call, backend=rewritten, **_isolated())(args, kwargs)


def _isolated() -> dict[str, Any]:
    """Newer torch can keep a compile's cache entries apart from all others."""
    return {"isolate_recompiles": True} if "isolate_recompiles" in inspect.signature(torch.compile).parameters else {}
