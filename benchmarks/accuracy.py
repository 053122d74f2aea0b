"""What int8 costs a language model in accuracy, by every outlier policy, beside bfloat16 and other libraries.

    python -m benchmarks.accuracy
    python -m benchmarks.accuracy --windows 8 --length 256 --json accuracy.json

The model is SmolLM2-135M unless one is named. Perplexity is that of CPython's help topics, and calibrations are made of
another text, the docstrings of its standard library. Beside perplexity: how far the distributions of the next token are
from those of the float32 model (Kullback-Leibler divergence, which tells forms apart long before perplexity does), how
often the most likely token is the same, and for how many tokens greedy texts are. Intervals are of 95 %, by bootstrap
over windows, which are the same for all forms. Chaos is how much logits move when the embeddings are off by 1e-7 of
their size.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import transformers
import typer
from rich.console import Console
from torch.nn import functional

import int8compile
from benchmarks import common, peers, smollm2

PROMPT_TOKENS = 24
#: whose docstrings are the text of calibrations
MODULES = (
    *("argparse", "ast", "asyncio", "cmd", "collections", "configparser", "csv", "datetime", "decimal", "difflib"),
    *(
        "dis",
        "doctest",
        "email.message",
        "functools",
        "heapq",
        "http.client",
        "inspect",
        "itertools",
        "json",
        "logging",
    ),
    *("mailbox", "optparse", "os", "pathlib", "pdb", "pickle", "random", "re", "sched", "shutil", "smtplib"),
    *("socket", "ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "turtle"),
    *("typing", "unittest", "urllib.request", "uuid", "warnings", "weakref", "zipfile"),
)

Make = Callable[[Any], Any]  # a copy of the float32 model to a form of it


def docstrings() -> str:
    """The docstrings of some modules of the standard library, with those of their classes and functions."""
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        own = [value for _, value in sorted(vars(module).items()) if getattr(value, "__module__", None) == name]
        for thing in (module, *own):
            methods = sorted(vars(thing).items()) if inspect.isclass(thing) else []
            found += [inspect.getdoc(each) for each in (thing, *(m for _, m in methods if callable(m)))]
    return "\n\n".join(filter(None, found))


def int8(**options: Any) -> Make:
    def make(model: Any) -> Any:
        int8compile.quantize_(model, options)
        return model

    return make


def forms(calibrations: dict[str, Any]) -> dict[str, Make]:
    """All that are compared, by name; each is given a float32 model of its own."""

    def of_peer(quantize: Callable[..., None], **options: Any) -> Make:
        def make(model: Any) -> Any:
            quantize(model, **options)
            return model

        return make

    return {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.to(torch.bfloat16),
        "weights only": int8(activation="float"),
        "column, 6.0": int8(),
        "column, 3.0": int8(llm_int8_threshold=3.0),
        "element, 6.0": int8(outlier_policy="element"),
        "none": int8(outlier_policy="none"),
        **{name: int8(calibration=calibration) for name, calibration in calibrations.items()},
        "bitsandbytes": of_peer(peers.quantize_bitsandbytes_),
        "torchao, dynamic": of_peer(peers.quantize_torchao_, weight_only=False),
        "torchao, weights": of_peer(peers.quantize_torchao_, weight_only=True),
    }


def main(
    model: Annotated[str | None, typer.Option(help="folder or hub name; default: SmolLM2-135M-Instruct")] = None,
    windows: Annotated[int, typer.Option(min=2)] = 32,
    length: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 512,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 32,
    prompts: Annotated[int, typer.Option(min=0, help="the beginnings of so many windows, continued")] = 4,
    tokens: Annotated[int, typer.Option(min=8, help="generated for a prompt")] = 200,
    only: Annotated[list[str] | None, typer.Option(help="forms beside float32; can be repeated")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Compare forms of a model with the float32 model."""
    folder = model or str(smollm2.folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    original.requires_grad_(False)
    text = torch.tensor(common.token_windows(tokenizer, windows, length))
    output: dict[str, Any] = {
        "kind": "accuracy", "machine": common.machine(), "model": folder.rsplit("/", 1)[-1], "windows": len(text),
        "length": length, "prompts": min(prompts, len(text)), "tokens": tokens, "forms": {},
    }  # fmt: skip
    console = Console(highlight=False, stderr=json_file == "-", width=110)
    with torch.no_grad(), common.progress() as progress:
        calibrations = _calibrations(original, tokenizer, calibration_windows, length, output, only)
        chosen = {name: make for name, make in forms(calibrations).items() if name == "float32" or _wanted(name, only)}
        measure = Measure(original, text, text[:prompts, :PROMPT_TOKENS], tokens)
        for name, make in progress.track(chosen.items(), description=output["model"]):
            try:
                output["forms"][name] = measure(make(copy.deepcopy(original)))
            except peers.AbsentError as error:
                output["forms"][name] = {"absent": str(error)}
    for result in output["forms"].values():
        if "absent" not in result:
            summarize(result, output["forms"]["float32"])
    _print(output, console)
    common.write_json(output, json_file)


def _wanted(name: str, only: list[str] | None) -> bool:
    return not only or name in only


def _calibrations(
    model: Any, tokenizer: Any, windows: int, length: int, output: dict[str, Any], only: list[str] | None
) -> dict[str, Any]:
    wanted = {
        "calibrated, 1 %": {"budget": 0.01},
        "calibrated, 2 %": {"budget": 0.02},
        "calibrated, 4 %": {"budget": 0.04},
        "calibrated, 2 %, 3 % float": {"budget": 0.02, "max_float_weights": 0.03},
    }
    tokens = tokenizer(docstrings(), add_special_tokens=False).input_ids
    step = max(length, (len(tokens) - length) // windows)
    batches = torch.tensor([tokens[at : at + length] for at in range(0, len(tokens) - length + 1, step)][:windows])
    made, output["calibration_seconds"] = {}, {}
    for name, options in wanted.items():
        if _wanted(name, only):
            start = time.perf_counter()
            made[name] = int8compile.calibrate(model, batches.split(1), progress=False, **options)
            output["calibration_seconds"][name] = time.perf_counter() - start
    return made


class Measure:
    """Measures forms of one model against it."""

    def __init__(self, model: Any, text: torch.Tensor, prompts: torch.Tensor, tokens: int) -> None:
        self.model, self.text, self.prompts, self.tokens = model, text, prompts, tokens

    def __call__(self, form: Any) -> dict[str, Any]:
        losses, divergences, same = [], [], []
        for window in self.text.split(1):
            want = self.model(input_ids=window).logits[0].float().log_softmax(-1)
            got = form(input_ids=window).logits[0].float().log_softmax(-1)
            losses.append(float(functional.nll_loss(got[:-1], window[0, 1:])))
            divergences.append(float((want.exp() * (want - got)).sum(-1).mean()))
            same.append(float((want.argmax(-1) == got.argmax(-1)).float().mean()))
        texts = [self._continued(form, prompt) for prompt in self.prompts.split(1)] if len(self.prompts) else []
        return {
            "losses": losses, "divergences": divergences, "same_top_1": same, "texts": texts,
            "chaos": statistics.fmean(self._chaos(form, window) for window in self.text[:2].split(1)),
        }  # fmt: skip

    def _continued(self, form: Any, prompt: torch.Tensor) -> list[int]:
        lengths = {"max_new_tokens": self.tokens, "min_new_tokens": self.tokens}
        mask = torch.ones_like(prompt)
        made = form.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        return made[0, prompt.shape[1] :].tolist()  # type: ignore[no-any-return]

    @staticmethod
    def _chaos(form: Any, window: torch.Tensor) -> float:
        """How much logits move, relative to their spread, when embeddings are off by 1e-7 of their size."""
        embedded = form.get_input_embeddings()(window)
        noise = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0)).to(embedded.dtype)
        plain, moved = (
            form(inputs_embeds=e).logits.double() for e in (embedded, embedded + 1e-7 * embedded.abs() * noise)
        )
        return float((moved - plain).norm() / (plain - plain.mean(-1, keepdim=True)).norm())


def summarize(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """Add what is said of a form: numbers, and intervals of those that are means over windows."""
    differences = [a - b for a, b in zip(result["losses"], reference["losses"], strict=True)]
    result["perplexity"] = common.perplexity(result["losses"])
    result["change"], result["change_interval"] = _bootstrap(differences, lambda mean: 100 * math.expm1(mean))
    result["divergence"], result["divergence_interval"] = _bootstrap(result["divergences"], lambda mean: mean)
    result["top_1"], result["top_1_interval"] = _bootstrap(result["same_top_1"], lambda mean: mean)
    pairs = zip(result["texts"], reference["texts"], strict=True)
    result["same_tokens"] = statistics.fmean(map(_same, *zip(*pairs, strict=True))) if result["texts"] else None


def _bootstrap(values: list[float], of_mean: Callable[[float], float]) -> tuple[float, tuple[float, float]]:
    """A function of the mean, and where it lies in 95 of 100 samples of the values with repetition."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(2000))
    return of_mean(statistics.fmean(values)), (of_mean(means[50]), of_mean(means[-51]))


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    console.print(f"{output['model']}: {output['windows']} windows of {output['length']} tokens")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "perplexity", "change, %", "KL, 1e-3", "same top 1, %", "same tokens", "chaos"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for name, result in output["forms"].items():
        if "absent" in result:
            table.add_row(name, "absent")
            continue
        low, high = result["change_interval"]
        table.add_row(
            name, f"{result['perplexity']:.3f}", f"{result['change']:+.2f} ({low:+.2f} to {high:+.2f})",
            f"{1e3 * result['divergence']:.3f}", f"{100 * result['top_1']:.1f}",
            "-" if result["same_tokens"] is None else f"{result['same_tokens']:.0f}", f"{result['chaos']:.1e}",
        )  # fmt: skip
    console.print(table)
    for name, seconds in output["calibration_seconds"].items():
        console.print(f"{name}: made in {seconds:.0f} s")


if __name__ == "__main__":
    typer.run(main)
