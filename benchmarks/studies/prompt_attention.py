"""Where is ``int8compile::attention`` faster than PyTorch's attention? Prompts, by dtype, and a few queries.

    python -m benchmarks.studies.prompt_attention

Each call in turns: PyTorch's, int8compile's kernels by name (``--kernels``), and for one query over grouped heads
PyTorch's with the heads of a group as rows (``folded``, the pass ``fold_queries``). The results of this study are the
table in ``int8compile/native/attention.py``. On a CPU with AVX512, PyTorch keeps to AVX2 by
``ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2``; with ``--kernels avx2``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn import functional

import int8compile.ops  # noqa: F401 (defines the operator)
from benchmarks import common
from benchmarks.common import Timing
from int8compile.native import loader


class Shape(NamedTuple):
    """Query heads, key/value heads, queries, keys, width of a head; mask: ``tensor``, ``causal`` or None."""

    heads: int
    kv_heads: int
    queries: int
    keys: int
    width: int
    mask: str | None


SHAPES = {
    "SmolLM2, static cache": Shape(9, 3, 512, 640, 64, "tensor"),
    "SmolLM2, causal": Shape(9, 3, 512, 512, 64, "causal"),
    "Llama-3.2-1B, static cache": Shape(32, 8, 512, 640, 64, "tensor"),
    "wide heads, causal": Shape(8, 8, 512, 512, 128, "causal"),
    "BERT, 128": Shape(12, 12, 128, 128, 64, None),
    "BERT, 512": Shape(12, 12, 512, 512, 64, None),
    "SmolLM2, 1 query": Shape(9, 3, 1, 640, 64, "tensor"),
    "SmolLM2, 2 queries": Shape(9, 3, 2, 640, 64, "tensor"),
    "SmolLM2, 8 queries": Shape(9, 3, 8, 640, 64, "tensor"),
    "SmolLM2, 15 queries": Shape(9, 3, 15, 640, 64, "tensor"),
    "GPT-2, 1 query": Shape(12, 12, 1, 640, 64, "tensor"),
    "GPT-2, 8 queries": Shape(12, 12, 8, 640, 64, "tensor"),
}
DTYPES = ("float32", "bfloat16", "float16")
SAMPLE_SECONDS = 2e-3

Form = Callable[[], torch.Tensor]


def main(
    threads: Annotated[int | None, typer.Option(min=1, help="as many as torch takes, if not given")] = None,
    kernels: Annotated[str, typer.Option(help="names, with commas; auto is what a call takes")] = "auto",
    only: Annotated[str, typer.Option(help="shapes whose names have this in them")] = "",
    dtypes: Annotated[str, typer.Option(help="with commas")] = ",".join(DTYPES),
    rounds: Annotated[int, typer.Option(min=1)] = 11,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time attention of prompts and of a few queries, PyTorch's and int8compile's, in turns."""
    if threads is not None:
        torch.set_num_threads(threads)
    loader.load("cpu")
    output: dict[str, Any] = {"kind": "prompt_attention", "machine": common.machine()}
    results = output["results"] = []
    cases = [(name, dtype) for name in SHAPES if only in name for dtype in dtypes.split(",")]
    with torch.no_grad(), common.progress() as progress:
        for name, dtype in progress.track(cases):
            forms = _forms(SHAPES[name], getattr(torch, dtype), kernels.split(","))
            results.append({"shape": name, "dtype": dtype, "ms": _measure(forms, rounds)})
    torch.ops.int8compile_native.set_attention("auto")
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _forms(shape: Shape, dtype: torch.dtype, kernels: list[str]) -> dict[str, Form]:
    torch.manual_seed(0)
    heads, kv_heads, queries, keys, width, mask_kind = shape
    # as projections leave them, [batch, position, head, width]; a cache is contiguous
    query = torch.randn(1, queries, heads, width).to(dtype).transpose(1, 2)
    key, value = (torch.randn(1, kv_heads, keys, width).to(dtype) for _ in range(2))
    first = 0 if queries > 64 else keys * 4 // 5 - queries  # queries behind a part of the cache
    position = torch.arange(first, first + queries)[:, None]
    mask = torch.arange(keys) <= position if mask_kind == "tensor" else None
    causal, grouped, scale = mask_kind == "causal", heads > kv_heads, width**-0.5
    attend = functional.scaled_dot_product_attention

    def ours(name: str) -> torch.Tensor:
        torch.ops.int8compile_native.set_attention(name)
        out: torch.Tensor = torch.ops.int8compile.attention(query, key, value, mask, scale, causal)
        return out

    def folded() -> torch.Tensor:
        rows = query.squeeze(2).unflatten(1, (kv_heads, -1))
        return attend(rows, key, value, mask).flatten(1, 2).unsqueeze(2)

    forms: dict[str, Form] = {
        "torch": lambda: attend(query, key, value, mask, is_causal=causal, enable_gqa=grouped),
        **{name: functools.partial(ours, name) for name in kernels},
    }
    return {**forms, "folded": folded} if queries == 1 and grouped else forms


def _measure(forms: dict[str, Form], rounds: int) -> dict[str, dict[str, float]]:
    expected = forms["torch"]().float()
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for name, form in forms.items():
        torch.testing.assert_close(form().float(), expected, rtol=2e-2, atol=2e-2, msg=name)
    for _ in range(rounds):
        for name, form in forms.items():
            seconds[name].append(common.seconds_a_call(form, SAMPLE_SECONDS))
    return {name: vars(Timing.of(samples)) for name, samples in seconds.items()}


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/], {torch.get_num_threads()} threads")
    names = list(dict.fromkeys(name for result in output["results"] for name in result["ms"]))
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title="us a call, and how it compares")
    for column in ("", "dtype", *names):
        table.add_column(column, justify="right" if column in names else "left", no_wrap=True)
    for result in output["results"]:
        base = result["ms"]["torch"]["median"]
        cells = []
        for name in names:
            median = result["ms"][name]["median"] if name in result["ms"] else None
            ratio = "" if median is None or name == "torch" else f" [dim]{base / median:.2f}x[/]"
            cells.append("" if median is None else f"{common.significant(1e3 * median)}{ratio}")
        table.add_row(result["shape"], result["dtype"], *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
