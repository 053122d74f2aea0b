"""What a decoded token costs beside arithmetic: operator calls, their dispatch, and the check of the weights.

    python -m benchmarks.studies.calls
    python -m benchmarks.studies.calls --model FOLDER_OR_HUB_ID --backend int8-head --json calls.json

* calls: operators that run in one decode step (static cache of 512), by torch.profiler, and the microseconds that the
  profiler sees in them. It slows every call down: compare these with each other, not with the clock
* dispatch: microseconds of a call on tensors so small that nothing else is left (M = 1, K = N = 8), under ``no_grad``
  as in users' code and under ``inference_mode``
* runner: what this package does in a step before inductor's code begins. It finds each weight's int8 form, and makes
  sure that the weight is what it was
"""

from __future__ import annotations

import collections
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any
from unittest import mock

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Timing
from benchmarks.model.contender import load, own_process
from benchmarks.model.random_llama import SHAPES
from int8compile import backend as int8_backend
from int8compile import handoff, ops

CACHED = 512


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    shape: Annotated[str | None, typer.Option(help=f"random weights instead: {', '.join(SHAPES)}")] = None,
    dtype: Annotated[str | None, typer.Option(help="default: bfloat16 where the CPU has it, or float32")] = None,
    backend: Annotated[str, typer.Option(help="int8, or int8-head: the output embedding in int8 too")] = "int8",
    steps: Annotated[int, typer.Option(help="decode steps that are timed", min=1)] = 30,
    threads: Annotated[int | None, typer.Option(help="default: torch's own", min=1)] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Count the operator calls of a decoded token, and time what they cost."""
    if backend not in ("int8", "int8-head"):
        raise typer.BadParameter(f"{backend!r}; expected int8 or int8-head", param_hint="--backend")
    if shape is not None and (shape not in SHAPES or model is not None):
        raise typer.BadParameter(
            f"{shape!r}; expected one of {', '.join(SHAPES)}, and no --model", param_hint="--shape"
        )
    own_process()
    if threads:
        torch.set_num_threads(threads)
    dtype = dtype or common.default_dtype("cpu")
    path = f"shape:{shape}" if shape else model or _default_model()
    output: dict[str, Any] = {
        "kind": "calls",
        "machine": common.machine() | {"providers": common.providers("cpu")},
        "model": path,
        "dtype": dtype,
    }
    output |= {"backend": backend, "steps": steps, "dispatch_us": dispatch_us(getattr(torch, dtype))}
    output |= _decode(load(path, dtype), backend == "int8", steps)
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _default_model() -> str:
    from benchmarks.smollm2 import folder

    return str(folder())


def dispatch_us(dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Microseconds of a call on tiny tensors, by operator, under ``no_grad`` and under ``inference_mode``."""
    found: dict[str, dict[str, float]] = {}
    for name, mode in (("no_grad", torch.no_grad), ("inference_mode", torch.inference_mode)):
        with mode():
            for op, (function, arguments) in _tiny_calls(dtype).items():
                found.setdefault(op, {})[name] = _microseconds(functools.partial(function, *arguments))
    return found


def _tiny_calls(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    x = torch.randn(1, 8, dtype=dtype)
    weight, scale = ops.quantize_weight(torch.randn(8, 8))
    codes, row_scale, outliers = ops.quantize_rowwise(x, 6.0)
    return {
        "int8compile::linear": (ops.linear, (x, weight, scale, None, 6.0)),
        "int8compile::quantize_rowwise": (ops.quantize_rowwise, (x, 6.0)),
        "int8compile::scaled_mm": (ops.scaled_mm, (codes, row_scale, x, outliers, weight, scale, None, dtype)),
        "aten::linear": (functional.linear, (x, torch.randn(8, 8, dtype=dtype))),
    }


def _microseconds(call: Callable[[], Any], count: int = 500, samples: int = 7) -> float:
    for _ in range(count):
        call()
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for _ in range(count):
            call()
        times.append((time.perf_counter() - start) / count)
    return 1e6 * statistics.median(times)


@contextlib.contextmanager
def _timed_runner(spent: dict[str, list[float]]) -> Iterator[Callable[..., Any]]:
    """A backend like ``int8`` that notes the seconds of each call: of all of it, and of inductor's part."""

    def timed(function: Callable[..., Any], key: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            start = time.perf_counter()
            out = function(*args)
            spent[key].append(time.perf_counter() - start)
            return out

        return call

    compile_graph = handoff.compile_graph

    def compile_timed(*args: Any) -> Any:
        return timed(compile_graph(*args), "inductor")

    def backend(gm: Any, inputs: Any, **kwargs: Any) -> Any:
        return timed(int8_backend.int8(gm, inputs, **kwargs), "whole")

    with mock.patch.object(handoff, "compile_graph", compile_timed):
        yield backend


def _decode(model: Any, skip_output_embeddings: bool, steps: int) -> dict[str, Any]:
    """Times and operator calls of decode steps."""
    from transformers import StaticCache

    spent: dict[str, list[float]] = {"whole": [], "inductor": []}
    options: dict[str, Any] = {"skip_output_embeddings": skip_output_embeddings}
    room = -(-(CACHED + 2 * steps + 3) // 128) * 128
    with torch.no_grad(), _timed_runner(spent) as backend:
        cache = StaticCache(config=model.config, max_cache_len=room)
        model(torch.zeros(1, CACHED, dtype=torch.long), past_key_values=cache, use_cache=True)
        compiled: Any = torch.compile(model, backend=backend, dynamic=False, options=options)
        ids = torch.tensor([[1]])

        def step() -> float:
            start = time.perf_counter()
            compiled(ids, past_key_values=cache, use_cache=True).logits[0, -1].argmax().item()
            return time.perf_counter() - start

        for _ in range(3):
            step()
        for times in spent.values():
            times.clear()
        whole = [step() for _ in range(steps)]
        graphs = len(spent["whole"]) // steps
        compiled_s, inductor_s = (_by_step(spent[key], graphs) for key in ("whole", "inductor"))  # before profiling
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(steps):
                step()
    calls = collections.Counter({e.key: e.count for e in profile.key_averages() if "::" in e.key})
    times_us = {e.key: e.cpu_time_total / steps for e in profile.key_averages() if "::" in e.key}
    return {
        "token_ms": vars(Timing.of(whole)),
        "runner_us": 1e6 * _median_difference(compiled_s, inductor_s),
        "outside_us": 1e6 * _median_difference(whole, compiled_s),
        "graphs": graphs,
        "calls": {name: {"count": count / steps, "us": times_us[name]} for name, count in calls.most_common()},
    }


def _by_step(seconds: list[float], graphs: int) -> list[float]:
    return [sum(seconds[i : i + graphs]) for i in range(0, len(seconds), graphs)]


def _median_difference(longer: list[float], shorter: list[float]) -> float:
    return statistics.median(a - b for a, b in zip(longer, shorter, strict=True))


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    providers = ", ".join(output["machine"]["providers"])
    console.print(f"{output['model']}, {output['dtype']}, {output['backend']} by {providers}, {CACHED} tokens cached")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("operator", no_wrap=True)
    for name in ("calls a token", "us in them\n(profiled)", "dispatch, us\nno_grad", "dispatch, us\ninference_mode"):
        table.add_column(name, justify="right")
    dispatch = output["dispatch_us"]
    for name in dict.fromkeys([*dispatch, *output["calls"]]):
        seen, alone = output["calls"].get(name, {"count": 0, "us": 0.0}), dispatch.get(name, {})
        cells = [f"{alone[mode]:.2f}" if alone else "" for mode in ("no_grad", "inference_mode")]
        table.add_row(name, f"{seen['count']:g}", f"{seen['us']:.0f}", *cells)
    console.print(table)
    ours = {name: c["count"] for name, c in output["calls"].items() if name.startswith("int8compile::")}
    spent = sum(count * dispatch[name]["no_grad"] for name, count in ours.items() if name in dispatch)
    console.print(f"a token: {Timing(**output['token_ms']).median:.2f} ms in {output['graphs']} graphs, of which")
    console.print(f"  {spent:.0f} us are the dispatch of {sum(ours.values()):g} calls of our operators,")
    console.print(f"  {output['runner_us']:.0f} us the check of the weights and what else is before inductor's code,")
    console.print(f"  {output['outside_us']:.0f} us Dynamo's guards and the model's code around its graphs")


if __name__ == "__main__":
    typer.run(main)
