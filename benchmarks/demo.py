"""What ``torch.compile(model, backend="int8")`` does to a language model, on this machine, in a few minutes.

    python -m benchmarks.demo                                  # SmolLM2-135M-Instruct, fetched the first time
    python -m benchmarks.demo --model FOLDER_OR_HUB_ID         # any causal language model of transformers

Compares the float model under inductor with the same model under int8: a continuation of the same prompt, perplexity,
weight memory, and times. Each number is measured in this run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from typing import Annotated, Any

import rich.box
import rich.progress
import rich.table
import typer
from rich.console import Console
from rich.text import Text

from benchmarks import common
from benchmarks.model.contender import Contender

WINDOW = 512  # tokens of a prompt, and of a perplexity window: one compiled graph serves both
BURST = 8  # tokens that one model decodes before it is the other's turn

console = Console(highlight=False)


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    prompt: Annotated[str, typer.Option(help="text to continue")] = "The three states of matter are",
    dtype: Annotated[str | None, typer.Option(help="default: bfloat16 where the hardware has it, or float32")] = None,
    device: Annotated[str | None, typer.Option(help="default: cuda if there is one, or cpu")] = None,
    tokens: Annotated[int, typer.Option(help="length of the continuation", min=1)] = 40,
    windows: Annotated[int, typer.Option(help=f"number of {WINDOW}-token windows for perplexity", min=1)] = 4,
) -> None:
    """Float against int8 on one language model: text, perplexity, memory and time."""
    start = time.perf_counter()
    device = device or common.default_device()
    dtype = dtype or common.default_dtype(device)
    console.print(f"[bold]{common.machine_line(common.machine(device))}[/]")
    path = model or _default_model()

    import transformers

    transformers.logging.set_verbosity_error()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    texts = common.token_windows(tokenizer, windows, WINDOW)
    prompt_tokens = tokenizer(prompt).input_ids

    console.print(f"{path} in {dtype}")
    console.print('[bold]torch.compile(model)[/] against [bold]torch.compile(model, backend="int8")[/]\n')
    # Freeing the float weights is what makes the memory figure true of the process and not only of the graph.
    options = {"release_weights": True}
    with (
        closing(Contender(path, dtype=dtype, backend="inductor", device=device)) as floating,
        closing(Contender(path, dtype=dtype, backend="int8", device=device, options=options)) as int8,
    ):
        pair = (floating, int8)
        first = _prepare(pair, texts[0], prompt_tokens, tokens)
        memory = [c.submit("tensor_bytes").result() for c in pair]
        report = int8.submit("report").result()
        scores, steps, continuations = _measure(pair, texts, first, tokens)

    console.print(report)
    _print_continuations(tokenizer, prompt, dtype, continuations)
    _print_table(dtype, report, memory, scores, steps)
    _print_verdict(dtype, report, scores, steps)
    console.print(f"[dim]{time.perf_counter() - start:.0f} s in all[/]")


def _default_model() -> str:
    from benchmarks.smollm2 import folder

    return str(folder())


def _prepare(pair: tuple[Contender, ...], text: list[int], prompt: list[int], tokens: int) -> list[int]:
    """Load both models and compile both graphs of each, all at the same time; the first new token of each."""
    jobs: dict[str, list[tuple[str, Future[Any]]]] = {}
    for c in pair:
        jobs[c.name] = [
            ("load", c.loaded),
            ("make the cache", c.submit("open_cache", len(prompt) + tokens)),
            ("compile the prompt graph", c.submit("score", text)),
            # The prompt goes through the decode graph token by token, which spares compiling a third graph.
            ("compile the decode graph", c.submit("decode", prompt, 1)),
        ]
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("[dim]{task.fields[doing]}"),
    )
    with rich.progress.Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=len(steps), doing="load") for name, steps in jobs.items()}
        waiting = {future for steps in jobs.values() for _, future in steps}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5)
            for future in done:
                future.result()
            for name, steps in jobs.items():
                left = [doing for doing, future in steps if not future.done()]
                progress.update(tasks[name], completed=len(steps) - len(left), doing=left[0] if left else "ready")
    return [steps[-1][1].result()[0][0] for steps in jobs.values()]


def _measure(
    pair: tuple[Contender, ...], texts: list[list[int]], first: list[int], tokens: int
) -> tuple[list[list[tuple[float, float]]], list[list[float]], list[list[int]]]:
    """Both models in turns: (seconds, nats) of each window, seconds of each token, and the tokens."""
    scores: list[list[tuple[float, float]]] = [[] for _ in pair]
    steps: list[list[float]] = [[] for _ in pair]
    continuations = [[token] for token in first]
    with _bar("measure prompts and perplexity", len(texts)) as advance:
        for text in texts:
            for c, results in zip(pair, scores, strict=True):
                results.append(c.submit("score", text).result())
            advance(1)
    with _bar("measure tokens and continue the prompt", tokens - 1) as advance:
        while len(continuations[0]) < tokens:
            count = min(BURST, tokens - len(continuations[0]))
            for c, seconds, continuation in zip(pair, steps, continuations, strict=True):
                new, times = c.submit("decode", continuation[-1:], count).result()
                continuation += new
                seconds += times
            advance(count)
    return scores, steps, continuations


@contextmanager
def _bar(description: str, total: int) -> Iterator[Any]:
    with rich.progress.Progress(console=console, transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)


def _print_continuations(tokenizer: Any, prompt: str, dtype: str, continuations: list[list[int]]) -> None:
    """Both texts; what differs is underlined."""
    floating, int8 = continuations
    same = next((i for i, (a, b) in enumerate(zip(floating, int8, strict=True)) if a != b), len(int8))
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in continuations]
    common_text = tokenizer.decode(int8[:same], skip_special_tokens=True)
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD, pad_edge=False, title="greedy continuation", title_justify="left", show_header=False
    )
    for name, text in zip((dtype, "int8"), texts, strict=True):
        shared = common_text if text.startswith(common_text) else ""
        table.add_row(name, Text.assemble((prompt, "dim"), shared, (text[len(shared) :], "underline")))
    console.print(table)
    console.print(f"The first {same} of {len(int8)} tokens are the same.\n")


def _print_table(
    dtype: str,
    report: Any,
    memory: list[int],
    scores: list[list[tuple[float, float]]],
    steps: list[list[float]],
) -> None:
    """Float and int8 side by side, with what each number means."""
    perplexities = [common.perplexity(nll for _, nll in results) for results in scores]
    prompts = [_median_ms([seconds for seconds, _ in results]) for results in scores]
    rows = [
        (
            "weights read, MiB",
            [report.weight_bytes_before / 2**20, report.weight_bytes_after / 2**20],
            "by one run of the compiled graph, from int8compile's report",
        ),
        (
            "weights held, MiB",
            [size / 2**20 for size in memory],
            "all tensors alive in the process (int8 with the option release_weights=True)",
        ),
        (
            "perplexity",
            perplexities,
            f"of {len(scores[0])} x {WINDOW} tokens of English: exp of the mean loss a token; lower is better",
        ),
        (
            f"prompt of {WINDOW} tokens, ms",
            prompts,
            f"median of {len(scores[0])}, both in turns",
        ),
    ]
    if all(steps):
        rows.append(("one more token, ms", [_median_ms(s) for s in steps], f"median of {len(steps[0])}, both in turns"))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", dtype, "int8", "int8 : float"):
        table.add_column(name, justify="right" if name else "left")
    for name, (floating, int8), _ in rows:
        # Perplexities differ late.
        digits = 4 if name == "perplexity" else 3
        cells = (common.significant(value, digits) for value in (floating, int8, int8 / floating))
        table.add_row(name, *cells)
    console.print(table)
    for name, _, meaning in rows:
        console.print(f"[dim]{name.split(',')[0]}: {meaning}[/]")
    console.print()


def _median_ms(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _print_verdict(dtype: str, report: Any, scores: list[list[tuple[float, float]]], steps: list[list[float]]) -> None:
    """In words, the bad news too."""
    ratios = {"a prompt": _speedup([[s for s, _ in results] for results in scores])}
    if all(steps):
        ratios["a token"] = _speedup(steps)
    words = [
        f"{what} [green]{ratio:.2f} times faster[/]"
        if ratio >= 1
        else f"{what} [yellow]{1 / ratio:.2f} times slower[/]"
        for what, ratio in ratios.items()
    ]
    console.print(f"Here int8 makes {' and '.join(words)} than {dtype} under inductor.")
    if min(ratios.values()) < 1:
        console.print(f"Its products ran on: {', '.join(report.providers)}.")


def _speedup(times: list[list[float]]) -> float:
    """How many times as fast the second is."""
    return statistics.median(times[0]) / statistics.median(times[1])


if __name__ == "__main__":
    typer.run(main)
