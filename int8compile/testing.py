"""Golden graphs of your own models: their rewritten graphs as text that is the same everywhere.

    from int8compile.testing import assert_int8_graph

    def test_feed_forward():
        assert_int8_graph(FeedForward(64, 128), (torch.ones(2, 64),), \"\"\"\"\"\", config={"min_features": 0})

``EXPECTTEST_ACCEPT=1 pytest`` writes the text into the test's source, between the quotes; review it, commit it, and
from then on a change of your model, of its options or of int8compile that changes the graph fails with a diff. The
same calls work in ``unittest``. ``examples/golden_suite`` is such a suite, with a guide.

Three assertions, from the strictest to the one that takes any model:

``assert_int8_graph``   the whole rewritten graph of a module that FX can trace symbolically: a block, a layer
``assert_op_counts``    how many of each operator the rewritten graphs of any model hold
``assert_int8_sites``   which linears of any model run in int8, and for which Reason the others do not

The text of a graph is that of ``int8compile.dump`` after a line with its version. Within a version the form does not
change: one node a line, values numbered and symbolic sizes renamed by first appearance, no name or address that depends
on the run, the Python or the torch version. (Symbolic tracing is part of this: what Dynamo and AOTAutograd make of a
model changes between torch versions.) A new version is announced in the changelog, and its goldens are accepted anew.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from int8compile.backend import rewrite as rewrite_dynamo_graph
from int8compile.config import PASS_NAMES, Int8Config
from int8compile.errors import CaptureError
from int8compile.explanation import explain
from int8compile.graph.capture import Capture, mark_constant_as
from int8compile.graph.dump import DUMP_VERSION, dump, target_name
from int8compile.native.providers import choose_provider
from int8compile.passes import PIPELINE, PassContext, run
from int8compile.report import Reason, folded
from int8compile.torch_internals.tensors import new_fake_mode

VERSION_LINE = f"# int8compile graph, version {DUMP_VERSION}"


def assert_int8_graph(
    model: torch.nn.Module,
    args: tuple[torch.Tensor, ...],
    expected: str,
    *,
    config: object = None,
    dynamic: bool = False,
    skip: int = 0,
) -> None:
    """Assert that a module's rewritten graph has this text.

    Args:
        model: what FX can trace symbolically: no Python control flow on tensors. Gradients do not count, as under
            ``torch.no_grad()``. Only shapes and dtypes matter, never values.
        args: its arguments, tensors.
        expected: a triple-quoted literal, which ``EXPECTTEST_ACCEPT=1`` rewrites.
        config: options, as for ``torch.compile``. (Small blocks want ``{"min_features": 0}``.)
        dynamic: make the first dimension of each argument symbolic.
        skip: how many calls lie between this one and the literal, for a helper of your own.

    Raises:
        AssertionError: with a diff.
        CaptureError: the module cannot be traced symbolically.
    """
    text = f"{VERSION_LINE}\n{dump(rewrite(model, *args, dynamic=dynamic, config=config)[0].graph)}"
    _assert_inline(text, expected, skip)


def assert_int8_sites(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    expected: str,
    *,
    kwargs: Mapping[str, Any] | None = None,
    config: object = None,
    skip: int = 0,
) -> None:
    """Assert where the linears of any model are and what becomes of them: a line for like ones of repeated layers.

        2x layers.*.fc 64 -> 128 float32 int8
        1x lm_head 64 -> 1000 float32 OUTPUT_EMBEDDING

    The model runs once, by ``int8compile.explain`` under ``torch.no_grad()``. ``expected`` and ``skip`` are as for
    ``assert_int8_graph``.
    """
    with torch.no_grad():
        report = explain(model, *args, options=config, **(kwargs or {}))
    lines = []
    for site, count in folded(report.sites).items():
        outcome = "int8" if site.reason is Reason.REWRITTEN else f"{site.reason.name} {site.detail}".strip()
        size = ("" if site.experts is None else f"{site.experts} x ") + f"{site.in_features} -> {site.out_features}"
        lines.append(f"{count}x {site.path} {size} {site.dtype} {outcome}\n")
    _assert_inline("".join(lines), expected, skip)


def assert_op_counts(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    expected: Mapping[str, int],
    *,
    kwargs: Mapping[str, Any] | None = None,
    config: object = None,
) -> None:
    """Assert how often the rewritten graphs of any model call an operator.

    Args:
        expected: counts by name as ``dump`` prints it, such as ``{"int8compile.linear": 4, "aten.linear": 0}``; what is
            not named is not looked at.

    Raises:
        AssertionError: with what was found.
    """
    found = op_counts(model, args, kwargs=kwargs, config=config)
    actual = {name: found[name] for name in expected}
    assert actual == dict(expected), (
        f"expected {dict(expected)}, found {actual}; all calls: {dict(sorted(found.items()))}"
    )


def op_counts(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    kwargs: Mapping[str, Any] | None = None,
    config: object = None,
) -> Counter[str]:
    """How often the rewritten graphs that Dynamo finds in a model call each function."""
    options = Int8Config.make(config)
    counts: Counter[str] = Counter()

    def look(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured, _ = rewrite_dynamo_graph(gm, example_inputs, options, choose_provider("reference", example_inputs))
        counts.update(target_name(node.target) for node in captured.graph.nodes if node.op == "call_function")
        return gm.forward

    def call() -> Any:
        return model(*args, **(kwargs or {}))

    with torch.no_grad():
        torch.compile(call, backend=look)()
    return counts


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return False


def trace(module: torch.nn.Module, *args: torch.Tensor, dynamic: bool = False) -> Capture:
    """A capture of ``module(*args)`` whose parameters and buffers are constant inputs, as in a graph of Dynamo's.

    Args:
        dynamic: make the first dimension of each argument symbolic.

    Raises:
        CaptureError: the module cannot be traced symbolically.
    """
    try:
        graph = _Tracer().trace(module)
    except (fx.proxy.TraceError, TypeError) as error:
        raise CaptureError(
            f"{type(module).__name__} cannot be traced symbolically ({error}); take a smaller part of the model, or "
            "assert_int8_sites and assert_op_counts, which take any"
        ) from error
    constants: dict[str, fx.Node] = {}
    values: list[Any] = list(args)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in constants:
            with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
                constants[name] = graph.placeholder("p_" + name.replace(".", "_"))
            values.append(operator.attrgetter(name)(module))
            mark_constant_as(constants[name], name)
        node.replace_all_uses_with(constants[name])
        graph.erase_node(node)
    gm = fx.GraphModule(module, graph)
    mode = new_fake_mode(ShapeEnv() if dynamic else None)
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
    config: object = None,
) -> tuple[Capture, PassContext]:
    """Trace a module and run the passes on its graph.

    Args:
        upto: the last pass to run, by name; all of them if None.
        dynamic: make the first dimension of each argument symbolic.
        grad: whether gradients are recorded.
        edit: changes the graph before the passes see it.
    """
    captured = trace(module, *args, dynamic=dynamic)
    if edit is not None:
        edit(captured)
    context = PassContext(captured, Int8Config.make(config), grad_enabled=grad)
    run(PIPELINE[: PASS_NAMES.index(upto) + 1] if upto else PIPELINE, context)
    return captured, context


def _assert_inline(actual: str, expected: str, skip: int) -> None:
    try:
        from expecttest import assert_expected_inline
    except ImportError as error:
        raise ImportError("int8compile.testing needs expecttest: pip install 'int8compile[testing]'") from error
    assert_expected_inline(actual, expected, skip=skip + 2)
