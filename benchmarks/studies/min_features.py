"""From which size on a linear is not slower in int8: where the default of ``Int8Config.min_features`` comes from.

    python -m benchmarks.studies.min_features
    python -m benchmarks.studies.min_features --sizes 64,128 --rows 1 --rounds 50 --json FILE

Times ``F.linear`` against ``torch.ops.int8compile.linear`` (activation quantised, int8 product, outlier product, all in
one) for square weights, in turns. Four columns of the activation are outliers. A ratio above 1: int8 is faster.
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

SIZES = (32, 64, 96, 128, 192, 256, 384, 512, 1024)
ROWS = (1, 16, 128, 512)
OUTLIER_COLUMNS = 4
THRESHOLD = 6.0
SAMPLE_SECONDS = 1e-3  # short calls are repeated so that a sample is at least this long


def main(
    sizes: Annotated[str, typer.Option(help="K = N, comma-separated")] = ",".join(map(str, SIZES)),
    rows: Annotated[str, typer.Option(help="M, comma-separated")] = ",".join(map(str, ROWS)),
    rounds: Annotated[int, typer.Option(help="samples of each", min=1)] = 25,
    device: Annotated[str | None, typer.Option(help="default: cuda if there is one, or cpu")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time float and int8 linears of many sizes in turns."""
    device = device or common.default_device()
    dtypes = [torch.float32, torch.bfloat16] if device != "cpu" or common.has_bf16() else [torch.float32]
    providers = common.providers(device)
    shapes = [(m, size) for size in common.numbers("--sizes", sizes) for m in common.numbers("--rows", rows)]
    results = []
    with torch.inference_mode(), common.progress() as progress:
        for m, size in progress.track(shapes, description="measure"):
            for dtype in dtypes:
                results.append(_measure(m, size, dtype, device, rounds))
    output = {
        "machine": common.machine(device),
        "providers": providers,
        "outlier_columns": OUTLIER_COLUMNS,
        "rounds": rounds,
        "results": results,
        "not_slower_from": _not_slower_from(results),
    }
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _measure(m: int, size: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of a float and an int8 linear with x [m, size] and weight [size, size]."""
    torch.manual_seed(0)
    x = torch.randn(m, size).clamp(-5, 5)
    x[0, torch.arange(OUTLIER_COLUMNS) * (size // OUTLIER_COLUMNS)] = 20.0
    x = x.to(device, dtype)
    weight = (torch.randn(size, size) / size**0.5).to(device, dtype)
    codes, scale = ops.quantize_weight(weight)
    linears: dict[str, Callable[[], torch.Tensor]] = {
        "float_ms": lambda: functional.linear(x, weight),
        "int8_ms": lambda: ops.linear(x, codes, scale, None, THRESHOLD),
    }
    calls = {name: max(1, int(SAMPLE_SECONDS / _seconds(call, 3, device))) for name, call in linears.items()}
    samples: dict[str, list[float]] = {name: [] for name in linears}
    for _ in range(rounds):
        for name, call in linears.items():
            samples[name].append(_seconds(call, calls[name], device))
    timings = {name: Timing.of(times) for name, times in samples.items()}
    return {
        "m": m,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        **{name: vars(timing) for name, timing in timings.items()},
        "speedup": timings["float_ms"].median / timings["int8_ms"].median,
    }


def _seconds(call: Callable[[], torch.Tensor], count: int, device: str) -> float:
    """Seconds a call, of ``count`` calls after one that is not timed."""
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def _not_slower_from(results: list[dict[str, Any]]) -> dict[str, dict[str, int | None]]:
    """By dtype and M (and for every M measured): the smallest size from which no larger one is slower in int8."""
    found: dict[str, dict[str, int | None]] = {}
    for dtype in dict.fromkeys(r["dtype"] for r in results):
        mine = [r for r in results if r["dtype"] == dtype]
        groups = {str(m): [r for r in mine if r["m"] == m] for m in sorted({r["m"] for r in mine})}
        found[dtype] = {m: _threshold(group) for m, group in {**groups, "every": mine}.items()}
    return found


def _threshold(results: list[dict[str, Any]]) -> int | None:
    slower = [r["size"] for r in results if r["speedup"] < 1]
    return min((r["size"] for r in results if r["size"] > max(slower, default=0)), default=None)


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    console.print(
        f"int8 kernels: {', '.join(output['providers'])}; {OUTLIER_COLUMNS} outlier columns, {output['rounds']} rounds"
    )
    for dtype, thresholds in output["not_slower_from"].items():
        results = {(r["size"], r["m"]): r for r in output["results"] if r["dtype"] == dtype}
        rows = sorted({m for _, m in results})
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"{dtype} F.linear against int8: speed-up, and us a call (float : int8)",
            title_justify="left",
        )
        table.add_column("K = N", justify="right")
        for m in rows:
            table.add_column(f"M = {m}", justify="right")
        for size in sorted({size for size, _ in results}):
            table.add_row(str(size), *(_cell(results[(size, m)]) for m in rows))
        console.print(table)
        every = thresholds["every"]
        if every is None:
            console.print(f"In {dtype}, int8 is slower for some M at every size measured.")
        else:
            console.print(f"In {dtype}, int8 is not slower from {every} features on, for every M measured.")
        by_m = [f"M = {m}: {size or 'none'}" for m, size in thresholds.items() if m != "every"]
        console.print(f"[dim]smallest size from which it is not slower: {', '.join(by_m)}[/]")


def _cell(result: dict[str, Any]) -> str:
    times = ":".join(common.significant(1e3 * result[name]["median"], 2) for name in ("float_ms", "int8_ms"))
    return f"[{'green' if result['speedup'] >= 1 else 'yellow'}]{result['speedup']:.2f}[/] [dim]({times})[/]"


if __name__ == "__main__":
    typer.run(main)
