"""A layer of experts: bfloat16 as torch compiles it, and int8, in turns in one process.

    python -m benchmarks.moe --json moe.json
    python -m benchmarks.moe --layers qwen3-30b-a3b --rows 1 --rounds 5

The layer is what transformers computes with ``experts_implementation="grouped_mm"``: router, topk, rows sorted by
expert, two grouped products with a gate between them, the sum over the experts of a token. Weights and tokens are
random, and each call has other tokens, which choose other experts: at one row the weights come from memory.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch import nn

import int8compile
from benchmarks import common
from benchmarks.common import Timing

INPUTS = 8  # tokens of different calls, where there are few of them
FEW_ROWS = 64
SAMPLE_SECONDS = 5e-3  # short calls are repeated so that a sample is at least this long


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a layer: experts, of which a token goes to ``active``; features of a token, and in an expert."""

    experts: int
    active: int
    hidden: int
    intermediate: int


LAYERS = {
    "qwen3-30b-a3b": Shape(experts=128, active=8, hidden=2048, intermediate=768),
    "mixtral-8x7b": Shape(experts=8, active=2, hidden=4096, intermediate=14336),
}
#: how many times as fast as bfloat16 int8 should be, by rows, where there are VNNI or AMX instructions
TARGETS = {1: 2.0, 512: 1.5}


class ExpertLayer(nn.Module):
    """A router and its experts, in bfloat16."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate_up_proj = _random(shape.experts, 2 * shape.intermediate, shape.hidden)
        self.down_proj = _random(shape.experts, shape.hidden, shape.intermediate)
        self.to(torch.bfloat16).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = self.shape
        weights, chosen = self.router(x).float().softmax(-1).topk(shape.active)
        by_expert, order = chosen.reshape(-1).sort()
        counts = torch.histc(by_expert.float(), bins=shape.experts, min=0, max=shape.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        rows = x[order // shape.active]
        gate, up = self._product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        out = self._product(nn.functional.silu(gate) * up, self.down_proj, ends)
        out = out[order.argsort()].view(*weights.shape, shape.hidden)
        return (out * weights.to(out.dtype).unsqueeze(-1)).sum(1)

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def _random(experts: int, n: int, k: int) -> nn.Parameter:
    """Random weights; each expert has the first one's rows in another order, which is drawn much faster."""
    first = torch.empty((n, k), dtype=torch.bfloat16).uniform_(-1, 1).mul_(k**-0.5)
    return nn.Parameter(torch.stack([first.roll(expert, dims=0) for expert in range(experts)]), requires_grad=False)


def main(
    layers: Annotated[str, typer.Option(help=f"comma-separated, of {', '.join(LAYERS)}")] = ",".join(LAYERS),
    rows: Annotated[str, typer.Option(help="tokens, comma-separated")] = "1,16,512",
    threads: Annotated[int | None, typer.Option(help="default: torch's own", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="samples of each", min=1)] = 15,
    seconds: Annotated[float, typer.Option(help="for each at one shape; at least 3 samples")] = 5.0,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time layers of experts in bfloat16 and in int8."""
    if threads:
        torch.set_num_threads(threads)
    names = [name.strip() for name in layers.split(",")]
    for name in names:
        if name not in LAYERS:
            raise typer.BadParameter(f"{name!r}; expected some of {', '.join(LAYERS)}", param_hint="--layers")
    output: dict[str, Any] = {
        "kind": "moe",
        "machine": common.machine() | {"providers": common.providers("cpu")},
        "rounds": rounds,
    }
    output["results"] = []
    console = Console(highlight=False, stderr=json_file == "-")
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    with torch.no_grad():
        for name in names:
            results = measure(LAYERS[name], common.numbers("--rows", rows), rounds, seconds)
            output["results"] += [{"layer": name, **result} for result in results]
            console.print(_table(name, results))
    common.write_json(output, json_file)


def measure(shape: Shape, rows: list[int], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Milliseconds of a call in bfloat16 and in int8, for each number of rows, and how far apart the results are."""
    torch.manual_seed(0)
    layer = ExpertLayer(shape)
    results = []
    for m in rows:
        torch.compiler.reset()
        inputs = [torch.randn(m, shape.hidden).bfloat16() for _ in range(INPUTS if m <= FEW_ROWS else 1)]
        compiled = {
            "bfloat16": torch.compile(layer, fullgraph=True),
            "int8": torch.compile(layer, backend="int8", fullgraph=True),
        }
        outs = {name: run(inputs[0]) for name, run in compiled.items()}
        report = int8compile.last_report()
        assert report is not None
        assert all(site.rewritten for site in report.sites if site.experts), str(report)
        difference = (outs["int8"].float() - outs["bfloat16"].float()).norm() / outs["bfloat16"].float().norm()
        times = _in_turns(compiled, inputs, rounds, seconds)
        results.append({"rows": m, "difference": float(difference), **{n: vars(t) for n, t in times.items()}})
    return results


def _in_turns(compiled: dict[str, Any], inputs: list[torch.Tensor], rounds: int, seconds: float) -> dict[str, Timing]:
    once = {name: _seconds(run, inputs, 1) * len(inputs) for name, run in compiled.items()}
    sweeps = {name: max(1, round(SAMPLE_SECONDS / seconds)) for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in compiled}
    spent = dict.fromkeys(compiled, 0.0)
    for _ in range(rounds):
        for name, run in compiled.items():
            if spent[name] < seconds or len(samples[name]) < 3:
                samples[name].append(_seconds(run, inputs, sweeps[name]))
                spent[name] += samples[name][-1] * sweeps[name] * len(inputs)
    return {name: Timing.of(times) for name, times in samples.items()}


def _seconds(run: Any, inputs: list[torch.Tensor], sweeps: int) -> float:
    start = time.perf_counter()
    for _ in range(sweeps):
        for x in inputs:
            run(x)
    return (time.perf_counter() - start) / (sweeps * len(inputs))


def _table(name: str, results: list[dict[str, Any]]) -> rich.table.Table:
    shape = LAYERS[name]
    title = f"{name}: {shape.experts} experts, {shape.active} active, {shape.hidden} x {shape.intermediate}; ms a call"
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in ("rows", "bfloat16", "int8", "times as fast", "target", "difference"):
        table.add_column(column, justify="right")
    for result in results:
        bf16, int8 = (common.significant(result[kind]["median"]) for kind in ("bfloat16", "int8"))
        ratio = result["bfloat16"]["median"] / result["int8"]["median"]
        target = TARGETS.get(result["rows"])
        verdict = "" if target is None else f"{target} {'met' if ratio >= target else 'missed'}"
        table.add_row(str(result["rows"]), bf16, int8, f"{ratio:.2f}", verdict, f"{result['difference']:.1e}")
    return table


if __name__ == "__main__":
    typer.run(main)
