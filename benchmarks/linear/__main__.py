"""One linear layer, ours against everything else that runs on this CPU, in turns in one process.

    python -m benchmarks.linear --json linear.json
    python -m benchmarks.linear --shapes 576x1536 --rows 1,128 --rounds 5 --only ours,onednn

Contenders (NAME.DTYPE where the activation's dtype matters; see ``benchmarks/linear/contenders.py``):

* linear: ``F.linear``
* int_mm, onednn-u8s8, onednn-s8s8: int8 products with nothing around them, the ceiling
* torchao: int8 dynamic, by inductor with max-autotune and freezing
* bitsandbytes: ``Linear8bitLt``, 4 outlier columns
* ours-0, ours-4, ours-1%: ``int8compile::linear`` with so many outlier columns, quantising and epilogue included
* ours-2%, ours-none, ours-calibrated: the outlier policies with 2 % of columns, with none, and with those 2 % named
* ours-weights: the same with int8 weights and the activation as it is

Up to M = 16, where a linear is as fast as its weight is read, each contender goes round copies of the weight that
together are twice as large as the last-level cache (at most 512 MB), since a decoder reads each weight from memory.
"""

from __future__ import annotations

import gc
import re
import time
from typing import Annotated, Any

import rich.box
import rich.progress
import rich.table
import torch
import typer
from rich.console import Console

from benchmarks import common, targets
from benchmarks.common import Timing
from benchmarks.linear.contenders import Case, Prepare, Prepared, WrongResultError, contenders
from benchmarks.peers import AbsentError

SHAPES = "576x1536,1536x576,2048x2048,4096x4096,4096x11008"
ROTATED_ROWS = 16  # up to this M, weights come from memory
MAX_ROTATED_BYTES = 512 * 2**20
SAMPLE_SECONDS = 2e-3  # short calls are repeated so that a sample is at least this long
MIN_SAMPLES = 3


def main(
    shapes: Annotated[str, typer.Option(help="KxN, comma-separated")] = SHAPES,
    rows: Annotated[str, typer.Option(help="M, comma-separated")] = "1,16,128,512",
    dtype: Annotated[
        str | None, typer.Option(help="of activations, comma-separated; default: float32, bfloat16 if in hardware")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="default: torch's own", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="samples of each contender", min=1)] = 15,
    seconds: Annotated[float, typer.Option(help="for a contender at one shape; at least 3 samples")] = 3.0,
    limit_ms: Annotated[float, typer.Option(help="a call slower than this is timed once")] = 1000.0,
    rotate: Annotated[
        bool, typer.Option(help="read weights from memory up to M = 16; --no-rotate: from the cache")
    ] = True,
    only: Annotated[str, typer.Option(help="contenders whose names begin so, comma-separated")] = "",
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time linears of many shapes in turns, and compare with the targets."""
    if threads:
        torch.set_num_threads(threads)
    dtypes = _dtypes(dtype)
    everyone = _selected(contenders(dtypes), only)
    cases = [(k, n, m) for k, n in _shapes(shapes) for m in common.numbers("--rows", rows)]
    cache_bytes = min(2 * common.last_level_cache_bytes(), MAX_ROTATED_BYTES) if rotate else 0
    output: dict[str, Any] = {
        "kind": "linear",
        "machine": common.machine() | {"providers": common.providers("cpu")},
        "dtypes": [_name(d) for d in dtypes],
        "rounds": rounds,
        "rotated_bytes": cache_bytes,
        "rotated_rows": ROTATED_ROWS,
    }
    results = output["results"] = []
    console = Console(highlight=False, stderr=json_file == "-")
    with torch.inference_mode(False), torch.no_grad(), common.progress() as progress:
        task = progress.add_task("", total=len(cases))
        for k, n, m in cases:
            progress.update(task, description=f"{k}x{n}, M = {m}")
            case = Case.random(m, k, n, cache_bytes if m <= ROTATED_ROWS else 0)
            results.append({"k": k, "n": n, "m": m, "contenders": _measure(case, everyone, rounds, seconds, limit_ms)})
            progress.advance(task)
            gc.collect()
    times = {(r["k"], r["n"], r["m"]): _medians(r) for r in results}
    output["targets"] = {d: [row.to_dict() for row in targets.linear_targets(times, d)] for d in output["dtypes"]}
    _print(output, console)
    for name in output["dtypes"]:
        rows_of = targets.linear_targets(times, name)
        console.print(targets.table(rows_of, f"targets (set for AMX on 2 cores), activations in {name}"))
    common.write_json(output, json_file)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtypes(text: str | None) -> list[torch.dtype]:
    if text is None:
        return [torch.float32, torch.bfloat16] if common.has_bf16() else [torch.float32]
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{name!r}; expected float32, bfloat16 or both", param_hint="--dtype")
    return [known[name] for name in dict.fromkeys(names)]


def _shapes(text: str) -> list[tuple[int, int]]:
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part)
        if match is None:
            raise typer.BadParameter(f"{part!r}; expected KxN, such as 4096x11008", param_hint="--shapes")
        shapes.append((int(match[1]), int(match[2])))
    return shapes


def _selected(everyone: dict[str, Prepare], only: str) -> dict[str, Prepare]:
    beginnings = tuple(part.strip() for part in only.split(",") if part.strip())
    found = {name: make for name, make in everyone.items() if not beginnings or name.startswith(beginnings)}
    if not found:
        raise typer.BadParameter(f"{only!r}; expected beginnings of {', '.join(everyone)}", param_hint="--only")
    return found


def _measure(
    case: Case, everyone: dict[str, Prepare], rounds: int, seconds: float, limit_ms: float
) -> dict[str, dict[str, Any]]:
    """Each contender's times in milliseconds, and its error; or the reason why there are none."""
    results: dict[str, dict[str, Any]] = {}
    ready: dict[str, tuple[Prepared, int]] = {}
    for name, prepare in everyone.items():
        try:
            prepared = prepare(case)
            result: dict[str, Any] = {
                "error": prepared.error(),
                "tolerance": prepared.tolerance,
                "weight_copies": prepared.calls,
            }
        except (AbsentError, WrongResultError) as error:
            results[name] = {"absent": str(error)}
            continue
        except Exception as error:  # a peer's own, of any kind: one contender's trouble must not end the run
            results[name] = {"absent": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"}
            continue
        once = _seconds(prepared, 1)
        if 1e3 * once > limit_ms:
            result |= {"ms": vars(Timing.of([once])), "note": f"one call only: above {limit_ms:g} ms"}
        else:
            ready[name] = prepared, max(1, round(SAMPLE_SECONDS / (once * prepared.calls)))
        results[name] = result
    samples: dict[str, list[float]] = {name: [] for name in ready}
    spent = dict.fromkeys(ready, 0.0)
    for _ in range(rounds):
        for name, (prepared, sweeps) in ready.items():
            if spent[name] < seconds or len(samples[name]) < MIN_SAMPLES:
                samples[name].append(_seconds(prepared, sweeps))
                spent[name] += samples[name][-1] * sweeps * prepared.calls
    for name, times in samples.items():
        results[name]["ms"] = vars(Timing.of(times))
    return results


def _seconds(prepared: Prepared, sweeps: int) -> float:
    """Seconds of one linear, of ``sweeps`` times all weight copies."""
    start = time.perf_counter()
    for _ in range(sweeps):
        prepared.run()
    return (time.perf_counter() - start) / (sweeps * prepared.calls)


def _medians(result: dict[str, Any]) -> dict[str, float]:
    return {name: c["ms"]["median"] for name, c in result["contenders"].items() if "ms" in c}


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    rotated = output["rotated_bytes"] / 2**20
    console.print(
        f"kernels: {', '.join(output['machine']['providers'])}; {output['rounds']} rounds; "
        + (
            f"up to M = {ROTATED_ROWS}, weights from memory ({rotated:.0f} MB of copies for each contender)"
            if rotated
            else "weights may be in the cache"
        )
    )
    results = output["results"]
    for k, n in dict.fromkeys((r["k"], r["n"]) for r in results):
        by_m = {r["m"]: r["contenders"] for r in results if (r["k"], r["n"]) == (k, n)}
        table = rich.table.Table(
            box=rich.box.SIMPLE_HEAD,
            pad_edge=False,
            title=f"{k}x{n}: us a call, and how many times as long as ours-4 of the same dtype takes",
            title_justify="left",
        )
        table.add_column("", no_wrap=True)
        for m in by_m:
            table.add_column(f"M = {m}", justify="right", no_wrap=True)
        for name in next(iter(by_m.values())):
            table.add_row(name, *(_cell(name, case, output["dtypes"]) for case in by_m.values()))
        console.print(table)
    for reason, names in _absent(results).items():
        console.print(f"[yellow]absent[/]: {', '.join(names)}: {reason}")


def _cell(name: str, case: dict[str, dict[str, Any]], dtypes: list[str]) -> str:
    if "ms" not in case[name]:
        return "[yellow]absent[/]"
    median = case[name]["ms"]["median"]
    dtype = name.rsplit(".", 1)[-1] if "." in name else dtypes[-1]
    ours = case.get(f"ours-4.{dtype if dtype in dtypes else dtypes[-1]}", {}).get("ms")
    ratio = f" {median / ours['median']:6.2f}x" if ours else ""
    return f"{common.significant(1e3 * median)}{'*' if 'note' in case[name] else ''}[dim]{ratio}[/]"


def _absent(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Reasons, and who is absent for them where."""
    found: dict[str, list[str]] = {}
    for r in results:
        for name, contender in r["contenders"].items():
            if "absent" in contender:
                found.setdefault(contender["absent"], []).append(f"{name} ({r['k']}x{r['n']}, M = {r['m']})")
    return found


if __name__ == "__main__":
    typer.run(main)
