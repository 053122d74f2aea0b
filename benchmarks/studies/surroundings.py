"""What surrounds the products of a decoded token: what do options of inductor and of torch.compile save?

    python -m benchmarks.studies.surroundings

SmolLM2-135M in int8, one token with 512 in a static cache. Each variant lives in a process of its own, and they take
turns, with torch.compile's guards and without (``torch.compiler.set_stance(skip_guard_eval_unsafe=True)``, which is
right only as long as no model, cache or shape that has a graph of its own takes another's place):

* as it is
* cpp_wrapper: inductor's wrapper in C++ (it takes twice as long to compile)
* no asserts: inductor checks no sizes and strides of its graph's inputs
* float: the same model in float, under inductor
"""

from __future__ import annotations

import statistics
from typing import Annotated, Any

import rich.box
import rich.table
import transformers
import typer
from rich.console import Console

from benchmarks import common, smollm2
from benchmarks.common import Timing
from benchmarks.model.contender import Contender

#: variant -> backend, options for torch.compile
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "as it is": ("int8", None),
    "cpp_wrapper": ("int8", {"inductor": {"cpp_wrapper": True}}),
    "no asserts": ("int8", {"inductor": {"size_asserts": False}}),
    "float": ("inductor", None),
}
STEPS = 8  # timed in a turn, after one that is not
WINDOW = 512


def main(
    dtype: Annotated[str | None, typer.Option(help="default: the one that the hardware multiplies")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time a decode step under several options, in turns."""
    dtype = dtype or common.default_dtype("cpu")
    path = str(smollm2.folder())
    text = common.token_windows(transformers.AutoTokenizer.from_pretrained(path), 1, WINDOW)[0]
    output: dict[str, Any] = {"kind": "surroundings", "machine": common.machine(), "dtype": dtype, "rounds": rounds}
    room = -(-(WINDOW + 1 + 2 * rounds * (STEPS + 1)) // 128) * 128
    contenders = {
        name: Contender(path, dtype=dtype, backend=backend, options=options)
        for name, (backend, options) in VARIANTS.items()
    }
    try:
        with common.progress() as progress:
            task = progress.add_task("compile", total=len(contenders))
            for contender in contenders.values():
                contender.submit("open_cache", room, text).result()
                contender.submit("decode", text[:1], 1).result()
                progress.advance(task)
            output["ms"] = _take_turns(contenders, text[:1], rounds, progress)
    finally:
        for contender in contenders.values():
            contender.close()
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _take_turns(
    contenders: dict[str, Contender], tokens: list[int], rounds: int, progress: Any
) -> dict[str, dict[str, dict[str, float]]]:
    """variant -> "guarded" and "unguarded" -> milliseconds of a step."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"guarded": [], "unguarded": []} for name in contenders}
    task = progress.add_task("measure", total=rounds * len(contenders))
    for _ in range(rounds):
        for name, contender in contenders.items():
            for key in ("guarded", "unguarded"):
                contender.submit("skip_guards", key == "unguarded").result()
                seconds[name][key] += contender.submit("decode", tokens, STEPS + 1).result()[1][1:]
            progress.advance(task)
    return {n: {key: vars(Timing.of(samples)) for key, samples in each.items()} for n, each in seconds.items()}


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/], {output['dtype']}")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title="a decode step, ms, and how it compares")
    for column in ("", "with guards", "without"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    base = output["ms"]["as it is"]["guarded"]["median"]
    for name, times in output["ms"].items():
        medians = [times[key]["median"] for key in ("guarded", "unguarded")]
        table.add_row(name, *(f"{common.significant(ms)} [dim]{base / ms:.2f}x[/]" for ms in medians))
    console.print(table)
    saved = [times["guarded"]["median"] - times["unguarded"]["median"] for times in output["ms"].values()]
    console.print(f"guards: {statistics.median(saved):.2f} ms (the median over variants)")


if __name__ == "__main__":
    typer.run(main)
