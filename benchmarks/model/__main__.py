"""Time and quality of whole models: int8 against float and against other int8 libraries, interleaved in one run.

    python -m benchmarks.model
    python -m benchmarks.model --peers --json model.json
    python -m benchmarks.model --shape llama-3.2-1b --json llama.json
    python -m benchmarks.model --model FOLDER_OR_HUB_ID --contenders float32-inductor,float32-int8 --rounds 15

A contender is DTYPE-BACKEND. Backends:

* eager, inductor; frozen (inductor with freezing), autotuned (with freezing and max-autotune)
* int8; int8-head, with the output embedding in int8 too; int8-weights-head, with its weights alone;
  int8-weights, with the weights of every linear alone
* emulation: LLM.int8() in float64 (``tests/helpers/gold.py``). Its perplexity is what int8 should have;
  its time says nothing, so it is not taken
* torchao (int8 dynamic), torchao-weights (int8 weights alone), both by inductor with freezing and max-autotune;
  bitsandbytes; onnxruntime (float32 alone); q8_0-llama.cpp. One that is not installed is reported as absent

By default eager and inductor in float32, int8 and emulation in float32; where the hardware multiplies bfloat16, int8
and emulation in that, with inductor beside them. ``--peers`` adds all others of these dtypes.

* prompt: 512 tokens, no key/value cache, the last position's logits, as ``generate`` reads one
* all logits: the same with those of every position; with a small model and a large vocabulary mostly ``lm_head``
* token: one decode step, greedy, with a static cache that holds 512 tokens
* perplexity: windows of 512 tokens of the help topics inside CPython
* logits: relative distance from the first eager contender's logits, after the prompt and after one decode step

``--shape`` takes a random model of that shape (``benchmarks/model/random_llama.py``) and one contender at a time, so
that no two are in memory; of ``--peers``, those that need several times the memory of float32 weights are left out.
"""

from __future__ import annotations

import math
import statistics
from typing import Annotated, Any

import numpy as np
import rich.progress
import torch
import typer
from rich.console import Console

from benchmarks import common, targets
from benchmarks.common import Timing
from benchmarks.model import table
from benchmarks.model.contender import BACKENDS, FLOAT_BACKENDS, FLOATS, PEERS, Contender
from benchmarks.model.random_llama import SHAPES, random_tokens

WINDOW = 512  # tokens of a prompt, and of a perplexity window: one compiled graph serves both
STEPS = 4  # timed decode steps a turn, after one that is not: it finds the caches full of others' data
WRONG = 0.5  # logits further from the float model's than this are no int8 version of it


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    shape: Annotated[str | None, typer.Option(help=f"random weights instead: {', '.join(SHAPES)}")] = None,
    contenders: Annotated[str | None, typer.Option(help="DTYPE-BACKEND, comma-separated; default: see above")] = None,
    peers: Annotated[bool, typer.Option("--peers", help="all other contenders too")] = False,
    rounds: Annotated[int, typer.Option(help="turns of each contender", min=1)] = 7,
    seconds: Annotated[float, typer.Option(help="for a contender's prompts, and for its decode steps")] = 120.0,
    windows: Annotated[int, typer.Option(help=f"{WINDOW}-token windows for perplexity", min=1)] = 8,
    device: Annotated[str | None, typer.Option(help="default: cuda if there is one, or cpu")] = None,
    threads: Annotated[int | None, typer.Option(help="default: torch's own", min=1)] = None,
    one_at_a_time: Annotated[bool, typer.Option(help="in memory; default: with --shape")] = False,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Compare contenders on one model: a prompt, a decode step, and what comes out."""
    device = device or common.default_device()
    if shape is not None and (shape not in SHAPES or model is not None):
        raise typer.BadParameter(
            f"{shape!r}; expected one of {', '.join(SHAPES)}, and no --model", param_hint="--shape"
        )
    names = _names(contenders, common.default_dtype(device), peers, is_random=shape is not None)
    path = f"shape:{shape}" if shape else model or _default_model()
    run = _Run(path, device, threads, rounds, seconds, _texts(path, shape, windows))
    if threads:
        torch.set_num_threads(threads)
    output = {"kind": "model", "machine": common.machine(device), "model": path, "window": WINDOW, "rounds": rounds}
    output |= {"windows": len(run.texts), "interleaved": not (one_at_a_time or shape)}
    groups = [names] if output["interleaved"] else [[name] for name in names]
    with common.progress() as progress:
        for group in groups:
            run.measure(group, progress)
    output["contenders"] = {name: run.results[name] for name in names}
    _add_ratios(run.results)
    timed = {name: result for name, result in run.results.items() if "absent" not in result}
    rows = targets.model_targets(timed, llama=shape == "llama-3.2-1b") if model is None and shape != "tiny" else []
    output["targets"] = [row.to_dict() for row in rows]
    table.show(output, rows, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _default_model() -> str:
    from benchmarks.smollm2 import folder

    return str(folder())


def _texts(path: str, shape: str | None, windows: int) -> list[list[int]]:
    if shape is not None:
        return random_tokens(shape, 1, WINDOW)  # perplexity of a random model means nothing
    import transformers

    transformers.logging.set_verbosity_error()
    return common.token_windows(transformers.AutoTokenizer.from_pretrained(path), windows, WINDOW)


def _names(contenders: str | None, dtype: str, peers: bool, is_random: bool) -> list[str]:
    if contenders:
        names = [name.strip() for name in contenders.split(",")]
    else:
        # bfloat16 in software is several times slower than float32, and nobody's choice
        dtypes = ["float32", dtype] if dtype != "float32" else ["float32"]
        names = ["float32-eager", *(f"{d}-inductor" for d in dtypes), f"{dtype}-int8"]
        if not is_random:
            names.append(f"{dtype}-emulation")
        if peers:
            # Frozen float32 weights are in memory three times (the model's, and prepacked for prompt and token), and
            # exported ones in as many files: 15 GB of the random model.
            frozen = [d for d in dtypes if not (is_random and d == "float32")]
            names += [f"{d}-{b}" for d in frozen for b in ("frozen", "autotuned")]
            names += [f"{dtype}-int8-head", f"{dtype}-int8-weights-head"]
            names += [f"{d}-{b}" for d in dtypes for b in ("torchao", "torchao-weights", "bitsandbytes")]
            names += ["q8_0-llama.cpp"] if is_random else ["float32-onnxruntime", "q8_0-llama.cpp"]
    for name in names:
        dtype, _, backend = name.partition("-")
        if dtype not in BACKENDS.get(backend, ()):
            raise typer.BadParameter(
                f"{name!r}; expected DTYPE-BACKEND with {', '.join(FLOATS)} and {', '.join(BACKENDS)} "
                "(float32-onnxruntime and q8_0-llama.cpp alone)",
                param_hint="--contenders",
            )
    return list(dict.fromkeys(names))


class _Run:
    """What is measured, and the results so far: ``{"absent": reason}`` for contenders that cannot run."""

    def __init__(
        self, path: str, device: str, threads: int | None, rounds: int, seconds: float, texts: list[list[int]]
    ) -> None:
        self.path, self.device, self.threads = path, device, threads
        self.rounds, self.seconds, self.texts = rounds, seconds, texts
        self.results: dict[str, dict[str, Any]] = {}
        self._logits: dict[str, Any] = {}  # of the first float contender, by "prompt" and "token"

    def measure(self, names: list[str], progress: rich.progress.Progress) -> None:
        """Load contenders, measure them in turns, and end them."""
        running: list[Contender] = []
        try:
            for name in names:
                dtype, _, backend = name.partition("-")
                c = Contender(self.path, dtype=dtype, backend=backend, device=self.device, threads=self.threads)
                running.append(c)
                task = progress.add_task(f"load and compile {name}", total=None)
                # One after another, since those that tune themselves must not time each other's compiler.
                self.results[name] = self._prepare(c)
                progress.remove_task(task)
                if "absent" in self.results[name]:
                    running.remove(c)
                    c.close()
            self._take_turns(running, progress)
            for c in running:
                self._add_report(c)
        finally:
            for c in running:
                c.close()

    def _prepare(self, c: Contender) -> dict[str, Any]:
        """Load and compile: seconds of the first two calls, and how far their logits are from the float model's."""
        text = self.texts[0]
        # Room for all steps, in steps of 128 so that a few rounds more find the same graph compiled.
        room = -(-(WINDOW + 1 + self.rounds * (STEPS + 1)) // 128) * 128
        try:
            c.loaded.result()
            if c.backend == "emulation":
                return {}
            c.submit("open_cache", room, text).result()
            seconds = c.submit("score", text).result()[0] + c.submit("prompt", text).result()
            logits = {"prompt": c.submit("last_logits").result()}
            seconds += sum(c.submit("decode", text[:1], 1).result()[1])
            logits["token"] = c.submit("last_logits").result()
        except Exception as error:  # a peer's own trouble, of any kind, must not end the run; ours must
            if c.backend not in PEERS:
                raise
            return {"absent": str(error).strip().splitlines()[0][:300]}
        if not self._logits and c.backend in FLOAT_BACKENDS:
            self._logits = logits
        result: dict[str, Any] = {"first_calls_s": round(seconds, 1)}
        if self._logits:
            errors = {key: _distance(value, self._logits[key]) for key, value in logits.items()}
            if not max(errors.values()) < WRONG:
                return {"absent": f"wrong logits: relative distance {errors} from the float model's"}
            result["logits_error"] = errors
        return result

    def _take_turns(self, running: list[Contender], progress: rich.progress.Progress) -> None:
        """Each turn a prompt, the same as a perplexity window, and a few decode steps."""
        prompt: dict[str, list[float]] = {c.name: [] for c in running}
        scored: dict[str, list[float]] = {c.name: [] for c in running}
        token: dict[str, list[float]] = {c.name: [] for c in running}
        nlls: dict[str, list[float]] = {c.name: [] for c in running}
        turns = max(self.rounds, len(self.texts))
        task = progress.add_task("measure", total=turns * len(running))
        for turn in range(turns):
            text = self.texts[turn % len(self.texts)]
            for c in running:
                is_timed = c.backend != "emulation" and turn < self.rounds
                # Of the peers, speed is what is asked, and the slowest of them take a minute for a prompt.
                is_window = turn < len(self.texts) and c.backend not in PEERS
                if is_window or (is_timed and sum(scored[c.name]) < self.seconds):
                    seconds, nll = c.submit("score", text).result()
                    scored[c.name].append(seconds)
                    if len(nlls[c.name]) == turn < len(self.texts):
                        nlls[c.name].append(nll)
                if is_timed and sum(prompt[c.name]) < self.seconds:
                    prompt[c.name].append(c.submit("prompt", text).result())
                if is_timed and sum(token[c.name]) < self.seconds:
                    token[c.name] += c.submit("decode", text[:1], STEPS + 1).result()[1][1:]
                progress.advance(task)
        progress.remove_task(task)
        for c in running:
            result = self.results[c.name]
            result["window_nll"] = nlls[c.name]
            if len(nlls[c.name]) == len(self.texts):
                result["perplexity"] = common.perplexity(nlls[c.name])
            if c.backend != "emulation":
                for key, seconds_of in (("prompt", prompt), ("all_logits", scored), ("token", token)):
                    result[f"{key}_ms"] = vars(Timing.of(seconds_of[c.name]))

    def _add_report(self, c: Contender) -> None:
        if c.backend.startswith("int8"):
            result = self.results[c.name]
            result["report"] = c.submit("report").result().to_dict()
            result["int8_weight_bytes"], result["bf16_weight_bytes"] = c.submit("int8_bytes").result()


def _distance(values: Any, reference: Any) -> float:
    return float(np.linalg.norm(values - reference) / np.linalg.norm(reference))


def _add_ratios(results: dict[str, dict[str, Any]]) -> None:
    """Speed against the fastest float contender, and perplexity against the emulation of the same dtype."""
    floats = [name for name in results if name.partition("-")[2] in FLOAT_BACKENDS and "prompt_ms" in results[name]]
    for result_name, result in results.items():
        for key in ("prompt", "all_logits", "token"):
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


if __name__ == "__main__":
    typer.run(main)
