"""What is PyTorch's attention of one query worth in other forms, by dtype?

    python -m benchmarks.studies.decode_attention

Grouped heads and a mask of a static cache, as a decoded token has them, in three forms of the same call:

* grouped: ``enable_gqa=True``, each query head by itself
* folded: the query heads of a group are the rows of one attention (the pass ``fold_queries``)
* written out: products, softmax and sum in float32, compiled by inductor

and without groups ``two rows``: the query as two equal rows, of which one is kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import rich.box
import rich.table
import torch
import typer
from rich.console import Console
from torch.nn import functional

from benchmarks import common
from benchmarks.common import Timing

#: query heads, key/value heads, width of a head
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "GPT-2": (12, 12, 64)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLE_SECONDS = 2e-3

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main(
    cache: Annotated[int, typer.Option(min=2, help="positions of the static cache; four in five are in use")] = 640,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    json_file: Annotated[str | None, typer.Option("--json", help="results as JSON in this file; - is stdout")] = None,
) -> None:
    """Time attention of one query in several forms, in turns."""
    output: dict[str, Any] = {"kind": "decode_attention", "machine": common.machine(), "cache": cache}
    results = output["results"] = []
    with torch.no_grad(), common.progress() as progress:
        for name, dtype in progress.track([(name, dtype) for name in MODELS for dtype in DTYPES]):
            times = _measure(*MODELS[name], dtype, cache, rounds)
            results.append({"model": name, "dtype": str(dtype).removeprefix("torch."), "ms": times})
    _print(output, Console(highlight=False, stderr=json_file == "-"))
    common.write_json(output, json_file)


def _measure(
    heads: int, kv_heads: int, width: int, dtype: torch.dtype, cache: int, rounds: int
) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    torch.compiler.reset()
    query, key, value = (torch.randn(1, n, s, width).to(dtype) for n, s in ((heads, 1), *[(kv_heads, cache)] * 2))
    mask = torch.zeros(1, 1, 1, cache, dtype=dtype).masked_fill(torch.arange(cache) >= cache * 4 // 5, -torch.inf)
    forms = _forms(heads // kv_heads)
    expected = forms["grouped"](query.float(), key.float(), value.float(), mask.float())
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for name, form in forms.items():
        torch.testing.assert_close(form(query, key, value, mask).float(), expected, rtol=2e-2, atol=2e-2, msg=name)
    for _ in range(rounds):
        for name, form in forms.items():
            seconds[name].append(
                common.seconds_a_call(functools.partial(form, query, key, value, mask), SAMPLE_SECONDS)
            )
    return {name: vars(Timing.of(samples)) for name, samples in seconds.items()}


def _forms(groups: int) -> dict[str, Form]:
    attend = functional.scaled_dot_product_attention

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q, k, v, mask, enable_gqa=groups > 1)

    def folded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q.squeeze(2).unflatten(1, (-1, groups)), k, v, mask).flatten(1, 2).unsqueeze(2)

    def two_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return attend(q.expand(-1, -1, 2, -1), k, v, mask)[:, :, :1]

    @torch.compile(dynamic=False)
    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q = q.squeeze(2).unflatten(1, (-1, groups)).float() * q.shape[-1] ** -0.5
        scores = (q[:, :, :, None] * k[:, :, None].float()).sum(-1) + mask.float()
        weights = scores.softmax(-1)[..., None]
        return (weights * v[:, :, None].float()).sum(-2).flatten(1, 2).unsqueeze(2).to(v.dtype)

    other: dict[str, Form] = {"folded": folded} if groups > 1 else {"two rows": two_rows}
    return {"grouped": grouped, **other, "written out": written_out}


def _print(output: dict[str, Any], console: Console) -> None:
    console.print(f"[bold]{common.machine_line(output['machine'])}[/], a cache of {output['cache']}")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title="us a call, and how it compares")
    for column in ("", "dtype", "grouped", "folded", "two rows", "written out"):
        table.add_column(column, justify="right" if column not in ("", "dtype") else "left", no_wrap=True)
    for result in output["results"]:
        base = result["ms"]["grouped"]["median"]
        cells = []
        for name in ("grouped", "folded", "two rows", "written out"):
            median = result["ms"][name]["median"] if name in result["ms"] else None
            ratio = "" if median is None or name == "grouped" else f" [dim]{base / median:.2f}x[/]"
            cells.append("" if median is None else f"{common.significant(1e3 * median)}{ratio}")
        table.add_row(result["model"], result["dtype"], *cells)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
