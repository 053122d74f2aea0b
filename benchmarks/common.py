"""What the benchmarks share: the text, the machine, and medians of interleaved times."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import pydoc_data.topics
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import rich.progress
import torch
import typer
from rich.console import Console

# Features of x86 and Arm CPUs that decide which int8 instructions there are.
_FLAGS = ("avx2", "avx_vnni", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def english_text() -> str:
    """The same English text on any machine: the help topics inside CPython, sorted by name (465,000 characters).

    A Python release may reword some, so compare perplexities within one Python version only.
    """
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def token_windows(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """The first ``count`` windows of ``length`` tokens of ``english_text``, side by side; fewer if it ends before."""
    tokens = tokenizer(english_text(), add_special_tokens=False).input_ids
    windows = [tokens[start : start + length] for start in range(0, count * length, length)]
    return [window for window in windows if len(window) == length]


def seconds_a_call(call: Callable[[], Any], sample_seconds: float) -> float:
    """Seconds of a call, of as many calls as take a sample's time."""
    start = time.perf_counter()
    call()
    count = max(1, int(sample_seconds / (time.perf_counter() - start)))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def perplexity(nlls: Iterable[float]) -> float:
    """From mean negative log-likelihoods (nats a token) of windows of one length."""
    return math.exp(statistics.fmean(nlls))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Median, minimum and maximum of repeated times, in milliseconds."""

    median: float
    min: float
    max: float
    samples: int

    @classmethod
    def of(cls, seconds: Iterable[float]) -> Timing:
        ms = [1e3 * s for s in seconds]
        return cls(statistics.median(ms), min(ms), max(ms), len(ms))

    def __str__(self) -> str:
        """The median, and below it the range."""
        return f"{significant(self.median)}\n{significant(self.min)} - {significant(self.max)}"


def significant(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent: 0.0123, 1.23, 12.3, 1230."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):.{max(0, decimals)}f}"


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a time depends on: versions, processor, instruction set, threads."""
    features = torch.cpu.get_capabilities()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": [flag for flag in _FLAGS if features.get(flag)],
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def machine_line(info: dict[str, Any]) -> str:
    """``machine()`` for people."""
    flags = " ".join(info["cpu_flags"]) or "no int8 or bf16 instructions known"
    return f"{info['device']} ({info['isa']}: {flags}), {info['threads']} threads, torch {info['torch']}"


def providers(device: str) -> list[str]:
    """Which of our kernels serve a device, such as ``native avx2 (cpu)``; loads them."""
    import int8compile

    linear = torch.nn.Linear(128, 128, bias=False).to(device)
    return int8compile.explain(linear, torch.empty(1, 128, device=device)).providers


def last_level_cache_bytes() -> int:
    """Bytes of the CPU's largest cache as Linux tells; 32 MB where it does not."""
    sizes = [_bytes(path.read_text()) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=32 * 2**20)


def _bytes(text: str) -> int:
    """Of ``32768K``."""
    text = text.strip()
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers above 0 in a comma-separated option, in order, each once.

    Raises:
        typer.BadParameter: it holds anything else.
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise typer.BadParameter(f"{text!r}; expected whole numbers above 0, comma-separated", param_hint=option)
    return found


def progress() -> rich.progress.Progress:
    """A progress bar on stderr, so that results on stdout can be piped."""
    return rich.progress.Progress(console=Console(stderr=True), transient=True)


def write_json(output: dict[str, Any], file: str | None) -> None:
    """Write results as JSON: to a file, to stdout (``-``), or nowhere (None)."""
    if file is None:
        return
    text = json.dumps(output, indent=1) + "\n"
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text)


def cpu_name() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name")
    return str(name or platform.processor() or platform.machine())


def has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 matrices in hardware (AMX, AVX512-BF16, Arm BF16) rather than in software."""
    return any(value is True for name, value in torch.cpu.get_capabilities().items() if name.endswith("bf16"))


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 wherever hardware multiplies it, float32 elsewhere."""
    return "bfloat16" if device != "cpu" or has_bf16() else "float32"
