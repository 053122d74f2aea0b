"""Memory that loading a model takes: float, quantised in place, quantised while loading, and from an int8 checkpoint.

    python -m benchmarks.studies.memory                        # SmolLM2-135M
    python -m benchmarks.studies.memory --model FOLDER --dtype bfloat16
    python -m benchmarks.studies.memory --programs             # sizes of exported programs and packages instead

Each way runs in a process of its own and is sampled every millisecond. "own" are the pages that belong to the process
alone; "resident" counts those of mapped checkpoint files as well, which the system can drop and read again at any time.
Tensors that are used as they stand in the file are not copied from there, so they show under "resident" only. What
imports and a first small model take is left out.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import psutil
import rich.box
import rich.console
import rich.table
import typer

from benchmarks.studies import program_sizes

COLUMNS = ("model", "largest tensor", "own, peak", "own, after", "resident, peak", "resident, after")
WAYS = ("float", "float, then quantize_", "int8 while loading", "int8 checkpoint")


def main(
    model: Annotated[str | None, typer.Option(help="transformers folder or hub id; default: SmolLM2-135M")] = None,
    dtype: Annotated[str, typer.Option(help="of the float model")] = "float32",
    programs: Annotated[bool, typer.Option("--programs", help="files of exported programs instead")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document")] = False,
    way: Annotated[str | None, typer.Option(hidden=True)] = None,
    int8: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Peak and final memory of each way of loading."""
    if model is None:
        from benchmarks.smollm2 import folder

        model = str(folder())
    if way is not None:
        print(json.dumps(measure(way, model, dtype, str(int8))))
        return
    if programs:
        logging.getLogger("torch.export").setLevel(logging.ERROR)
        found = program_sizes.sizes(model)
        print(json.dumps(found)) if as_json else rich.console.Console().print(program_sizes.table(found))
        return
    with tempfile.TemporaryDirectory() as work:
        results = {name: _in_a_process(name, model, dtype, work) for name in WAYS}
    if as_json:
        print(json.dumps({"model": model, "dtype": dtype, "bytes": results}))
        return
    table = rich.table.Table("way", box=rich.box.SIMPLE_HEAD, pad_edge=False, title=f"{Path(model).name}, {dtype}, MiB")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for way_, result in results.items():
        table.add_row(way_, *(f"{result[name] / 2**20:.1f}" for name in COLUMNS))
    rich.console.Console().print(table)


def _in_a_process(way: str, model: str, dtype: str, work: str) -> dict[str, int]:
    options = ["--model", model, "--dtype", dtype, "--way", way, "--int8", f"{work}/int8"]
    command = [sys.executable, "-m", "benchmarks.studies.memory", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(way: str, path: str, dtype: str, int8: str) -> dict[str, int]:
    """Load a model in one of ``WAYS`` in this process; bytes of the model, at the peak, afterwards."""
    import torch
    import transformers

    import int8compile
    from int8compile.integrations.transformers import Int8Config
    from int8compile.modules.int8_linear import load_kernels

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load_kernels("auto", "cpu")
    load = transformers.AutoModelForCausalLM.from_pretrained
    warm_up(load)
    with Sampler() as sampler:
        config = Int8Config() if way == "int8 while loading" else None
        given: dict[str, Any] = {"quantization_config": config} if config else {}
        model = load(int8 if way == "int8 checkpoint" else path, dtype=getattr(torch, dtype), **given)
        if way == "float, then quantize_":
            int8compile.quantize_(model)
    if way == "int8 while loading":
        model.save_pretrained(int8)
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    sizes = {"model": sum(tensors.values()), "largest tensor": max(tensors.values())}
    return {**sizes, **sampler.result()}


def warm_up(load: Any) -> None:
    """What loading imports and allocates once is no cost of the model."""
    import transformers

    from int8compile.integrations.transformers import Int8Config

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    with tempfile.TemporaryDirectory() as work:
        transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=128, **sizes)).save_pretrained(work)
        load(work, quantization_config=Int8Config())


class Sampler:
    """Within the context: the memory this process takes beyond what it had."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def result(self) -> dict[str, int]:
        """Bytes, by the names of ``COLUMNS``."""
        return {
            f"{kind}, {when}": value - start
            for when, values in (("peak", self._peak), ("after", self._after))
            for kind, value, start in zip(("own", "resident"), values, self._before, strict=True)
        }

    def _now(self) -> tuple[int, int]:
        info = self._process.memory_info()
        return info.rss - getattr(info, "shared", 0), info.rss

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            self._look()

    def _look(self) -> None:
        own, resident = self._now()
        self._peak = max(self._peak[0], own), max(self._peak[1], resident)

    def __enter__(self) -> Sampler:
        self._before = self._peak = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._after = self._now()


if __name__ == "__main__":
    typer.run(main)
