"""What do int8 weights alone cost, in the output embedding and everywhere, and what do int8 activations add?

    python -m benchmarks.studies.output_embedding
    python -m benchmarks.studies.output_embedding --windows 4 --tokens 50 --json embedding.json

For each form of a model: perplexity on English text, in how many places the most likely token is that of float, and,
of texts that it continues greedily, how many tokens are the same before the first that is not, and how many of their
fours of tokens are repeated ones: a model that is led astray turns round in circles, which perplexity hardly shows.
"""

from __future__ import annotations

import copy
import math
import statistics
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import transformers
import typer
from rich.console import Console
from torch.nn import functional

import int8compile
from benchmarks import common, smollm2

LM_HEAD = {"llm_int8_weight_only_modules": ["lm_head"]}
TAKEN = {"skip_output_embeddings": False}
#: what is left in float, and what the rest is -> options; None: no int8 at all
FORMS: dict[str, dict[str, Any] | None] = {
    "float": None,
    "lm_head alone: weights": {**LM_HEAD, "llm_int8_skip_modules": ["model"]},
    "lm_head alone: int8": {**TAKEN, "llm_int8_skip_modules": ["model"]},
    "lm_head alone: int8, threshold 0": {**TAKEN, "llm_int8_skip_modules": ["model"], "llm_int8_threshold": 0.0},
    "int8, lm_head float": {},
    "int8, lm_head weights": LM_HEAD,
    "int8, lm_head int8": TAKEN,
    "weights, lm_head float": {"activation": "float"},
    "weights, lm_head weights": {"activation": "float", **LM_HEAD},
}
PROMPT_TOKENS = 24


def main(
    model: Annotated[str | None, typer.Option(help="folder or hub name; default: SmolLM2-135M-Instruct")] = None,
    windows: Annotated[int, typer.Option(min=2)] = 16,
    length: Annotated[int, typer.Option(min=2, help="tokens of a window")] = 512,
    prompts: Annotated[int, typer.Option(min=1, help="the beginnings of so many windows")] = 6,
    tokens: Annotated[int, typer.Option(min=8, help="generated for a prompt")] = 200,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Compare forms of a model with the float model."""
    folder = model or str(smollm2.folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    original.requires_grad_(False)
    text = torch.tensor(common.token_windows(tokenizer, windows, length))
    output: dict[str, Any] = {
        "kind": "output_embedding", "machine": common.machine(), "model": folder.rsplit("/", 1)[-1], "dtype": dtype,
        "windows": len(text), "length": length, "prompts": min(prompts, len(text)), "tokens": tokens,
    }  # fmt: skip
    results = output["results"] = []
    console = Console(highlight=False, stderr=json_file == "-", width=100)
    with torch.no_grad(), common.progress() as progress:
        for name, options in progress.track(FORMS.items(), description=output["model"]):
            form = original if options is None else copy.deepcopy(original)
            if options is not None:
                int8compile.quantize_(form, options)
            results.append({"form": name, **_measured(form, text, prompts, tokens)})
            results[-1]["texts"] = tokenizer.batch_decode(results[-1]["generated"])
    _print(output, console)
    for result in results:
        del result["top"]
    common.write_json(output, json_file)


def _measured(model: Any, text: torch.Tensor, prompts: int, tokens: int) -> dict[str, Any]:
    losses, top = [], []
    for window in text.split(1):
        logits = model(input_ids=window).logits[0, :-1].float()
        losses.append(float(functional.cross_entropy(logits, window[0, 1:])))
        top.append(logits.argmax(-1))
    generated = [_continued(model, prompt, tokens) for prompt in text[:prompts, :PROMPT_TOKENS].split(1)]
    return {"losses": losses, "top": torch.cat(top), "generated": generated}


def _continued(model: Any, prompt: torch.Tensor, tokens: int) -> list[int]:
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **length)
    continued: list[int] = made[0, prompt.shape[1] :].tolist()
    return continued


def _repeated(tokens: list[int]) -> float:
    """The share of fours of tokens that were there before."""
    fours = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    return 1 - len(set(fours)) / len(fours)


def _same(a: list[int], b: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    console.print(
        f"{output['model']} in {output['dtype']}: {output['windows']} windows of {output['length']} tokens, "
        f"{output['prompts']} texts of {output['tokens']}"
    )
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "perplexity", "to float, %", "same top 1, %", "same tokens", "repeated, %"):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    first = output["results"][0]
    for result in output["results"]:
        differences = [a - b for a, b in zip(result["losses"], first["losses"], strict=True)]
        change = 100 * math.expm1(statistics.fmean(differences))
        error = 100 * statistics.stdev(differences) / math.sqrt(len(differences))
        result["perplexity"] = common.perplexity(result["losses"])
        result["change"], result["standard_error"] = change, error
        result["top_1"] = float((result["top"] == first["top"]).float().mean())
        result["same"] = statistics.fmean(map(_same, result["generated"], first["generated"]))
        result["repeated"] = statistics.fmean(map(_repeated, result["generated"]))
        table.add_row(
            result["form"], f"{result['perplexity']:.3f}", f"{change:+.2f} ± {error:.2f}",
            f"{100 * result['top_1']:.1f}", f"{result['same']:.0f}", f"{100 * result['repeated']:.0f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
