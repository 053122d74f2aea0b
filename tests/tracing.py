"""Graphs for pass tests: symbolically traced, so that their text does not depend on Dynamo or on torch's version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from int8compile.capture import Capture, mark_constant_as
from int8compile.config import Int8Config
from int8compile.graph_text import dump
from int8compile.passes import PIPELINE, PassContext, run
from int8compile.passes.runner import Pass


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def trace(module: torch.nn.Module, *args: torch.Tensor, dynamic: bool = False) -> Capture:
    """A capture of ``module(*args)`` whose parameters are constant inputs, as in a graph of Dynamo's.

    Args:
        dynamic: make the first dimension of each argument symbolic.
    """
    graph = _Tracer().trace(module)
    constants: dict[str, fx.Node] = {}
    values: list[Any] = list(args)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in constants:
            with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                constants[name] = graph.placeholder("p_" + name.replace(".", "_"))
            values.append(module.get_parameter(name))
            mark_constant_as(constants[name], name)
        node.replace_all_uses_with(constants[name])
        graph.erase_node(node)
    gm = fx.GraphModule(module, graph)
    mode = torch._subclasses.FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    fakes = [mode.from_tensor(v, static_shapes=not (dynamic and i < len(args))) for i, v in enumerate(values)]
    FakeTensorProp(gm, mode).propagate_dont_convert_inputs(*fakes)
    return Capture(gm, values, mode)


def rewrite(
    module: torch.nn.Module,
    *args: torch.Tensor,
    upto: str | None = None,
    dynamic: bool = False,
    grad: bool = False,
    edit: Callable[[Capture], None] | None = None,
    **options: object,
) -> tuple[Capture, PassContext]:
    """Trace and run the pipeline up to and including the pass named ``upto``, nothing being too small."""
    captured = trace(module, *args, dynamic=dynamic)
    if edit is not None:
        edit(captured)
    context = PassContext(captured, Int8Config.make({"min_features": 0, **options}), grad_enabled=grad)
    names = [p.__name__ for p in PIPELINE]
    passes: tuple[Pass, ...] = PIPELINE[: names.index(upto) + 1] if upto else PIPELINE
    run(passes, context)
    return captured, context


def golden(module: torch.nn.Module, *args: torch.Tensor, **kwargs: Any) -> str:
    """The text of the graph that ``rewrite`` gives."""
    return dump(rewrite(module, *args, **kwargs)[0].graph)
