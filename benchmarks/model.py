"""Times and perplexity of a language model in float and in int8, each contender in turn.

    python -m benchmarks.model
    python -m benchmarks.model --model FOLDER_OR_HUB_ID --contenders float32-inductor,float32-int8 --rounds 15 --json

A contender is DTYPE-BACKEND: float32, bfloat16 or float16, and eager, inductor, int8 or emulation. The last is
LLM.int8() in eager PyTorch (``benchmarks/emulation.py``): its perplexity is what int8 should have; its time says
nothing, so it is not taken. By default: float32-eager, float32-inductor, and int8 and emulation in float32, or in
bfloat16, with bfloat16-inductor beside them, where the hardware multiplies that.

* prompt: 512 tokens, no key/value cache, all logits
* token: one decode step, greedy, with a static cache that holds 512 tokens
* perplexity: windows of 512 tokens of the help topics inside CPython
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from concurrent.futures import Future, wait
from contextlib import ExitStack, closing
from typing import Annotated, Any

import rich.box
import rich.progress
import rich.table
import typer
from rich.console import Console

from benchmarks import common
from benchmarks.common import Timing
from benchmarks.contender import BACKENDS, Contender

WINDOW = 512  # tokens of a prompt, and of a perplexity window: one compiled graph serves both
STEPS = 4  # timed decode steps a turn, after one that is not: it finds the caches full of others' data

# Progress goes to stderr, so that --json can be piped.
progress_console = Console(stderr=True)
DTYPES = ("float32", "bfloat16", "float16")


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    contenders: Annotated[str | None, typer.Option(help="DTYPE-BACKEND, comma-separated; default: see above")] = None,
    rounds: Annotated[int, typer.Option(help="turns of each contender", min=1)] = 7,
    windows: Annotated[int, typer.Option(help=f"{WINDOW}-token windows for perplexity", min=1)] = 8,
    device: Annotated[str | None, typer.Option(help="default: cuda if there is one, or cpu")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="results as JSON on stdout")] = False,
) -> None:
    """Compare float and int8 contenders on one model, interleaved in one run.

    By default float32 in eager and inductor, int8, and an eager emulation of LLM.int8() for its perplexity; with
    bfloat16 under inductor, and int8 in it, where the hardware multiplies bfloat16.
    """
    device = device or common.default_device()
    names = _names(contenders, common.default_dtype(device))
    info = common.machine(device)
    path = model or _default_model()

    import transformers

    transformers.logging.set_verbosity_error()
    texts = common.token_windows(transformers.AutoTokenizer.from_pretrained(path), windows, WINDOW)
    # Room for all steps, in steps of 128 so that a few rounds more find the same graph compiled.
    room = -(-(WINDOW + 1 + rounds * (STEPS + 1)) // 128) * 128
    with ExitStack() as stack:
        running = []
        for name in names:
            dtype, backend = name.split("-")
            running.append(stack.enter_context(closing(Contender(path, dtype=dtype, backend=backend, device=device))))
        compile_seconds = _prepare(running, texts[0], room)
        results = _measure(running, texts, rounds)
        reports = {c.name: c.submit("report").result() for c in running if c.name.endswith("-int8")}

    for name, result in results.items():
        result["first_calls_s"] = compile_seconds[name]
        if reports.get(name) is not None:
            result["report"] = reports[name].to_dict()
    output = {"machine": info, "model": path, "window": WINDOW, "rounds": rounds, "windows": len(texts)}
    output["contenders"] = results
    _add_ratios(results)
    if as_json:
        json.dump(output, sys.stdout, indent=2)
        print()
    else:
        _print(output)


def _default_model() -> str:
    from examples.smollm2 import folder

    return str(folder())


def _names(contenders: str | None, dtype: str) -> list[str]:
    default = ["float32-eager", "float32-inductor", f"{dtype}-int8", f"{dtype}-emulation"]
    if dtype == "bfloat16":  # in software it is several times slower than float32, and nobody's choice
        default.insert(2, "bfloat16-inductor")
    names = [name.strip() for name in contenders.split(",")] if contenders else default
    for name in names:
        parts = name.split("-")
        if len(parts) != 2 or parts[0] not in DTYPES or parts[1] not in BACKENDS:
            raise typer.BadParameter(
                f"{name!r}; expected DTYPE-BACKEND with {', '.join(DTYPES)} and {', '.join(BACKENDS)}",
                param_hint="--contenders",
            )
    return list(dict.fromkeys(names))


def _is_timed(name: str) -> bool:
    return not name.endswith("-emulation")


def _prepare(running: list[Contender], text: list[int], room: int) -> dict[str, float]:
    """Load and compile all contenders side by side; seconds of each one's first two calls."""
    jobs: dict[str, list[Future[Any]]] = {}
    for c in running:
        jobs[c.name] = [c.loaded]
        if _is_timed(c.name):
            jobs[c.name] += [
                c.submit("open_cache", room, text),
                c.submit("score", text),
                c.submit("decode", text[:1], 1),
            ]
    with rich.progress.Progress(console=progress_console) as progress:
        task = progress.add_task("load and compile", total=sum(map(len, jobs.values())))
        waiting = {future for steps in jobs.values() for future in steps}
        while waiting:
            done, waiting = wait(waiting, timeout=0.5)
            for future in done:
                future.result()
            progress.advance(task, len(done))
    return {
        name: round(steps[2].result()[0] + sum(steps[3].result()[1]), 1) if len(steps) > 1 else 0.0
        for name, steps in jobs.items()
    }


def _measure(running: list[Contender], texts: list[list[int]], rounds: int) -> dict[str, dict[str, Any]]:
    """Round-robin: each turn a prompt (which is a perplexity window as well) and a few decode steps."""
    prompt: dict[str, list[float]] = {c.name: [] for c in running}
    token: dict[str, list[float]] = {c.name: [] for c in running}
    nlls: dict[str, list[float]] = {c.name: [] for c in running}
    with rich.progress.Progress(console=progress_console) as progress:
        task = progress.add_task("measure", total=max(rounds, len(texts)) * len(running))
        for turn in range(max(rounds, len(texts))):
            text = texts[turn % len(texts)]
            for c in running:
                if turn < len(texts) or (_is_timed(c.name) and turn < rounds):
                    seconds, nll = c.submit("score", text).result()
                    if turn < len(texts):
                        nlls[c.name].append(nll)
                    prompt[c.name].append(seconds)
                if _is_timed(c.name) and turn < rounds:
                    token[c.name] += c.submit("decode", text[:1], STEPS + 1).result()[1][1:]
                progress.advance(task)
    results: dict[str, dict[str, Any]] = {}
    for c in running:
        results[c.name] = {"perplexity": common.perplexity(nlls[c.name]), "window_nll": nlls[c.name]}
        if _is_timed(c.name):
            timings = {"prompt_ms": Timing.of(prompt[c.name]), "token_ms": Timing.of(token[c.name])}
            results[c.name] |= {key: vars(timing) for key, timing in timings.items()}
    return results


def _add_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Speed against the fastest float contender, and perplexity against the emulation of the same dtype."""
    floats = [name for name in results if name.endswith(("-eager", "-inductor"))]
    for result_name, result in results.items():
        for key in ("prompt", "token"):
            if floats and f"{key}_ms" in result:
                fastest = min(results[name][f"{key}_ms"]["median"] for name in floats)
                result[f"{key}_speedup"] = fastest / result[f"{key}_ms"]["median"]
        emulation = results.get(f"{result_name.split('-')[0]}-emulation")
        if result_name.endswith("-int8") and emulation is not None:
            # Two right computations differ: rounding flips a code here and there, and each flip travels on. So
            # the standard error, over windows, belongs to the figure.
            differences = [a - b for a, b in zip(result["window_nll"], emulation["window_nll"], strict=True)]
            result["perplexity_against_emulation"] = math.expm1(statistics.fmean(differences))
            if len(differences) > 1:
                result["standard_error"] = statistics.stdev(differences) / math.sqrt(len(differences))


def _print(output: dict[str, Any]) -> None:
    console = Console(highlight=False)
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    console.print(
        f"{output['model']}: prompt of {WINDOW} tokens, one token with {WINDOW} in a static cache, "
        f"{output['rounds']} rounds; perplexity of {output['windows']} x {WINDOW} tokens"
    )
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        caption="speed: the fastest float is 1",
        caption_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    for name in ("prompt, ms\nmin - max", "speed", "token, ms\nmin - max", "speed", "perplexity"):
        table.add_column(name, justify="right")
    for name, result in output["contenders"].items():
        cells = []
        for key in ("prompt", "token"):
            timing = result.get(f"{key}_ms")
            speed = result.get(f"{key}_speedup")
            cells += [str(Timing(**timing)) if timing else "", f"{speed:.2f}" if speed else ""]
        table.add_row(name, *cells, common.significant(result["perplexity"], 5))
    console.print(table)
    for name, result in output["contenders"].items():
        if "perplexity_against_emulation" in result:
            error = f" (standard error {result['standard_error']:.2%})" if "standard_error" in result else ""
            console.print(
                f"{name}: perplexity {result['perplexity_against_emulation']:+.2%}{error} "
                "against an eager LLM.int8() emulation"
            )
        if "report" in result:
            console.print(
                f"{name}: {result['report']['rewritten']} linears in int8 on {', '.join(result['report']['providers'])}"
            )


if __name__ == "__main__":
    typer.run(main)
