"""Where should an activation be quantised: in inductor's kernel that computes it, or in the operator that multiplies?

    python -m benchmarks.studies.fusion

Each case is a producer (RMSNorm behind a residual addition; silu(gate) * up; nothing, the activation is there) and the
linears that read it, compiled by inductor in three ways, all with native products:

* operator: ``int8compile::linear`` or, where several read it, one ``quantize_rowwise`` and a ``scaled_mm`` each
* inlined: the reference body of ``quantize_rowwise``, which inductor fuses into the producer, and ``scaled_mm``
* merged: ``int8compile::linear`` on the readers' weights joined into one (what the passes make of it)

and, for the share that quantising has in it at most, ``quantize_rowwise`` alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Timing
from int8compile import ops
from int8compile.ops._library import REFERENCES

THRESHOLD = 6.0
SAMPLE_SECONDS = 2e-3

#: name -> producer, K, and N of each linear that reads what it makes; SmolLM2-135M's, and those of a 1B Llama
CASES = {
    "rmsnorm -> q, k, v": ("rmsnorm", 576, (576, 192, 192)),
    "rmsnorm -> gate, up": ("rmsnorm", 576, (1536, 1536)),
    "silu * up -> down": ("silu", 1536, (576,)),
    "attention -> o": ("none", 576, (576,)),
    "rmsnorm -> gate, up, 1B": ("rmsnorm", 2048, (8192, 8192)),
    "silu * up -> down, 1B": ("silu", 8192, (2048,)),
}

Linears = list[tuple[torch.Tensor, torch.Tensor]]


def main(
    rows: Annotated[str, typer.Option(help="M, comma-separated")] = "1,16,512",
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time quantising inside and outside of the kernel that computes the activation, in turns."""
    output: dict[str, Any] = {"kind": "fusion", "machine": common.machine() | {"providers": common.providers("cpu")}}
    results = output["results"] = []
    with torch.no_grad(), common.progress() as progress:
        numbers = common.numbers("--rows", rows)
        for m, (name, case) in progress.track([(m, item) for m in numbers for item in CASES.items()]):
            results.append({"case": name, "m": m, **_measure(m, *case, rounds)})
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _measure(m: int, producer: str, k: int, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(m, k), torch.randn(m, k)
    x[0, :4] = 20.0
    linears = [ops.quantize_weight(torch.randn(n, k) / k**0.5) for n in sizes]
    merged = [(torch.cat([w for w, _ in linears]), torch.cat([s for _, s in linears]))]
    torch.compiler.reset()
    forms = {
        "operator": _compiled(producer, _by_operator, linears),
        "inlined": _compiled(producer, _inlined, linears),
        "merged": _compiled(producer, _by_operator, merged),
        "quantize": lambda a, b: ops.quantize_rowwise(a, THRESHOLD),
    }
    want = torch.cat(forms["operator"](x, y), dim=-1)
    for name in ("inlined", "merged"):
        torch.testing.assert_close(torch.cat(forms[name](x, y), dim=-1), want, rtol=1e-3, atol=1e-2)
    samples: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            samples[name].append(_seconds(form, x, y))
    return {f"{name}_ms": vars(Timing.of(times)) for name, times in samples.items()}


def _compiled(producer: str, consume: Callable[..., Any], linears: Linears) -> Callable[..., Any]:
    def run(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        if producer == "rmsnorm":
            x = functional.rms_norm(x + y, (x.shape[-1],))
        elif producer == "silu":
            x = functional.silu(y) * x
        outs: list[torch.Tensor] = consume(x, linears)
        return outs

    compiled: Callable[..., Any] = torch.compile(run, dynamic=False)
    return compiled


def _by_operator(x: torch.Tensor, linears: Linears) -> list[torch.Tensor]:
    if len(linears) == 1:
        return [ops.linear(x, *linears[0], None, THRESHOLD)]
    return _products(x, ops.quantize_rowwise(x, THRESHOLD), linears)


def _inlined(x: torch.Tensor, linears: Linears) -> list[torch.Tensor]:
    return _products(x, REFERENCES[ops.quantize_rowwise](x, THRESHOLD), linears)


def _products(
    x: torch.Tensor, quantized: tuple[torch.Tensor, torch.Tensor, torch.Tensor], linears: Linears
) -> list[torch.Tensor]:
    q, row_scale, outliers = quantized
    return [ops.scaled_mm(q, row_scale, x, outliers, w, s, None, x.dtype) for w, s in linears]


def _seconds(form: Callable[..., Any], x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds a call, of as many as take a sample's time."""
    start = time.perf_counter()
    form(x, y)
    count = max(1, int(SAMPLE_SECONDS / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        form(x, y)
    return (time.perf_counter() - start) / count


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/], {', '.join(output['machine']['providers'])}")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title="us a call, and how it compares")
    for column in ("", "M", "operator", "inlined", "merged", "quantising alone"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for r in output["results"]:
        base = r["operator_ms"]["median"]
        cells = [common.significant(1e3 * base)]
        for name in ("inlined", "merged"):
            median = r[f"{name}_ms"]["median"]
            cells.append(f"{common.significant(1e3 * median)} [dim]{base / median:.2f}x[/]")
        alone = r["quantize_ms"]["median"]
        table.add_row(r["case"], str(r["m"]), *cells, f"{common.significant(1e3 * alone)} [dim]{alone / base:.0%}[/]")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
