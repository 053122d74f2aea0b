"""The torch.compile backend: from Dynamo's graph to the function that Dynamo calls.

model = torch.compile(model, backend="int8")
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from int8compile import handoff, session
from int8compile.config import Int8Config, disabled
from int8compile.graph.capture import Capture, capture
from int8compile.graph.dump import dump, meta_tensor, meta_value
from int8compile.native import loader, providers
from int8compile.native.providers import Provider
from int8compile.passes import PIPELINE, PassContext, run
from int8compile.passes.analysis.overlaps import later_overlap, written_inputs
from int8compile.passes.analysis.sites import complete_sites, weight_uses
from int8compile.report import UNMATCHED, GraphBreak, GraphReport, Reason, Report
from int8compile.selection import unmatched
from int8compile.torch_internals import dynamo
from int8compile.torch_internals.dtensors import is_dtensor
from int8compile.weights.invalidation import watch_optimizers
from int8compile.weights.lifted_inputs import LiftedInput, LiftedInputs
from int8compile.weights.store import STORE

log = logging.getLogger(__name__)


def int8(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: object = None
) -> Callable[..., Any]:
    """Compile Dynamo's graph with its linears in int8. Called by torch.compile, not by users.

    Args:
        gm: Dynamo's graph; left as it is.
        example_inputs: its inputs, parameters and buffers included.
        mode, options: from ``torch.compile``; options are those of ``Int8Config``, as a dict, an ``Int8Config`` or a
            ``BitsAndBytesConfig``.

    Raises:
        OptionNameError, OptionValueError: an unknown option, or one with a bad value.
        KernelBuildError: ``kernels="native"`` and there are none, or ``release_weights`` without a C++ compiler.
    """
    config = Int8Config.make(options, mode=mode)
    if disabled():
        log.warning("int8: INT8COMPILE_DISABLE=1: the model is compiled in float")
        return handoff.compile_graph(gm, example_inputs, config, Provider("none", native=True))
    return compile_rewritten(gm, example_inputs, config, handoff.compile_graph)


int8.reset = STORE.clear  # type: ignore[attr-defined]  # torch._dynamo.reset() calls it


def compile_rewritten(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Int8Config,
    compiler: Callable[[fx.GraphModule, Sequence[Any], Int8Config, Provider], Callable[..., Any]],
) -> Callable[..., Any]:
    """Rewrite Dynamo's graph, report, and give the result to a compiler."""
    provider = providers.choose_provider(config.kernels, example_inputs)
    release = loader.release_storage() if config.release_weights else None
    captured, report = rewrite(gm, example_inputs, config, provider)
    session.record(report, dynamo.compiled_callable())
    announce(report)
    dynamo.trace_artifact("int8compile_graph", lambda: dump(captured.graph))
    dynamo.trace_artifact("int8compile_report", Report([report]).to_json)
    compiled = compiler(captured.gm, _compile_inputs(captured), config, provider)
    return _runner(captured, compiled, release, gm)


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Int8Config, provider: Provider
) -> tuple[Capture, GraphReport]:
    """Copy Dynamo's graph and run the passes on the copy."""
    captured = capture(gm, example_inputs, dynamo.fake_mode_of(map(meta_value, gm.graph.nodes)))
    native_cpu = provider.native and provider.device == "cpu"
    report = rewrite_capture(captured, config, provider, grad_enabled=torch.is_grad_enabled(), native_cpu=native_cpu)
    report.compile_id = dynamo.compile_id()
    graph_break = dynamo.graph_break_of(gm)
    report.graph_break = None if graph_break is None else GraphBreak(*graph_break)
    return captured, report


def rewrite_capture(
    captured: Capture, config: Int8Config, provider: Provider, *, grad_enabled: bool, native_cpu: bool = False
) -> GraphReport:
    """Run the passes on a captured graph, a copy of Dynamo's or an exported one.

    Args:
        native_cpu: whether the native CPU kernels compute the graph, in this process.
    """
    context = PassContext(captured, config, grad_enabled=grad_enabled, native_cpu=native_cpu)
    counts = run(PIPELINE, context)
    sites = complete_sites(captured.graph, context)
    return GraphReport(
        compile_id="-",
        provider=provider.name,
        sites=sites,
        weights=weight_uses(captured),
        unmatched=unmatched(config, sites),
        calibration=config.calibration.name if config.calibration is not None else None,
        pass_counts=counts,
    )


def _compile_inputs(captured: Capture) -> list[Any]:
    """Dynamo's own example inputs, as far as they are left, and those of the lifted weights."""
    lifted = [meta_tensor(node) for weight in captured.lifted.values() for node in weight.inputs]
    return [captured.examples[n] for n in captured.kept] + dynamo.static_inputs([t for t in lifted if t is not None])


def _runner(
    captured: Capture,
    compiled: Callable[..., Any],
    release: Callable[[torch.Tensor], None] | None,
    original: fx.GraphModule,
) -> Callable[..., Any]:
    """The function Dynamo calls: resolves each int8 weight through the store, then runs the compiled graph."""
    overlap = later_overlap(captured)
    if not captured.lifted and overlap is None:
        return compiled
    kept = [captured.position[node] for node in captured.kept]
    inputs = []
    for lifted in captured.lifted.values():
        sources = [(captured.position[node], transposed) for node, transposed in lifted.sources]
        may_release = not any(position in kept for position, _ in sources)
        gathered = any(node.meta.get("int8compile_of_fsdp") for node, _ in lifted.sources)
        free = release if may_release and not gathered else None
        inputs.append(LiftedInput(tuple(sources), free, gathered, lifted.columns))
    watch_optimizers()
    sharded = [at for node, at in captured.position.items() if is_dtensor(captured.examples[node])]
    fetch = LiftedInputs(STORE, inputs, written_inputs(captured), sharded).fetch

    def call(*args: Any) -> Any:
        lifted = fetch(args)
        if lifted is None or (overlap is not None and overlap(args)):
            _warn_of_overlap()
            return original.forward(*args)
        return compiled(*[args[i] for i in kept], *lifted)

    return call


@functools.cache
def _warn_of_overlap() -> None:
    log.warning(
        "int8: a compiled graph was given a tensor to write to that shares memory with one of its weights or other "
        "inputs, and did not when it was compiled; calls like this run in float"
    )


def announce(report: GraphReport) -> None:
    """Say once a graph what was done: at INFO, or at WARNING where nothing was or gradients stood in the way."""
    whole = Report([report])
    refusal = whole.commonest_refusal()
    trainable = sum(site.reason is Reason.TRAINABLE for site in report.sites)
    if not whole.rewritten and refusal is not None:
        log.warning("int8: %s. Most often %s: %s", whole.summary(), refusal.name, refusal.value)
    elif trainable:
        log.warning("int8: %s. %d TRAINABLE: %s", whole.summary(), trainable, Reason.TRAINABLE.value)
    elif report.sites:
        count = whole.attentions
        attentions = f", {count} attention{'s' * (count != 1)} by int8compile's kernels" if count else ""
        log.info("int8: %s%s", whole.summary(), attentions)
    so_far = session.last_report()
    if so_far is not None and so_far.unmatched and report.graph_break is None:
        log.warning("int8: %s: %s", UNMATCHED, ", ".join(so_far.unmatched))
