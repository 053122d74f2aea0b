"""Sizes of exported programs: of the 16-bit model as torch.export saves it, in int8, and packaged.

``python -m benchmarks.studies.memory --programs`` prints them for SmolLM2-135M and for random models of the base shapes
of BERT, ViT and GPT-2.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.progress
import rich.table
import torch

import int8compile

COLUMNS = ("16-bit program", "int8 program", "int8 package")


def models(path: str) -> dict[str, Callable[[], tuple[torch.nn.Module, dict[str, Any]]]]:
    """Makers of each model in bfloat16 with the inputs it is exported with; the first from a transformers folder."""
    import transformers

    ids = {"input_ids": torch.ones((2, 16), dtype=torch.int64)}
    image = {"pixel_values": torch.zeros((2, 3, 224, 224), dtype=torch.bfloat16)}

    def random(name: str, inputs: dict[str, Any]) -> Callable[[], tuple[torch.nn.Module, dict[str, Any]]]:
        def make() -> tuple[torch.nn.Module, dict[str, Any]]:
            family = name.removesuffix("LMHeadModel").removesuffix("Model")
            return getattr(transformers, name)(getattr(transformers, f"{family}Config")()).bfloat16().eval(), inputs

        return make

    def trained() -> tuple[torch.nn.Module, dict[str, Any]]:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        return model, {**ids, "use_cache": False}

    return {
        Path(path).name: trained,
        "BERT base": random("BertModel", ids),
        "ViT base": random("ViTModel", image),
        "GPT-2": random("GPT2LMHeadModel", {**ids, "use_cache": False}),
    }


def measure(model: torch.nn.Module, inputs: dict[str, Any], work: Path) -> Iterator[int]:
    """Bytes of each of ``COLUMNS``, one after the other."""
    with torch.no_grad():
        torch.export.save(torch.export.export(model, (), inputs), work / "float.pt2")
    yield (work / "float.pt2").stat().st_size
    program = int8compile.export(model, (), inputs)
    int8compile.save(program, work / "int8.pt2")
    yield (work / "int8.pt2").stat().st_size
    yield int8compile.package(program, work / "int8.aoti.pt2").stat().st_size


def sizes(path: str, makers: dict[str, Any] | None = None) -> dict[str, dict[str, int]]:
    """Bytes by model and column, with a progress bar on stderr."""
    results: dict[str, dict[str, int]] = {}
    makers = models(path) if makers is None else makers
    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=len(makers) * len(COLUMNS))
        for name, make in makers.items():
            results[name] = {}
            with tempfile.TemporaryDirectory() as work:
                steps = measure(*make(), Path(work))
                for column in COLUMNS:
                    bars.update(task, description=f"{name}: {column}")
                    results[name][column] = next(steps)
                    bars.advance(task)
    return results


def table(results: dict[str, dict[str, int]]) -> rich.table.Table:
    """MiB, and what part of the 16-bit program that is."""
    made = rich.table.Table("model", box=rich.box.SIMPLE_HEAD, pad_edge=False, title="files, MiB")
    for column in COLUMNS:
        made.add_column(column, justify="right")
    for name, found in results.items():
        whole = found[COLUMNS[0]]
        rest = [f"{found[c] / 2**20:.1f} ({found[c] / whole:.2f}x)" for c in COLUMNS[1:]]
        made.add_row(name, f"{whole / 2**20:.1f}", *rest)
    return made
