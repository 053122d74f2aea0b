"""The results of ``benchmarks/model`` for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import rich.box
import rich.table
from rich.console import Console

from benchmarks import common, targets
from benchmarks.common import Timing


def show(output: dict[str, Any], rows: Sequence[targets.Row], console: Console) -> None:
    """Print the machine, a table of contenders, what int8 did, who is absent and why, and the targets."""
    console.print(f"[bold]{common.machine_line(output['machine'])}[/]")
    window = output["window"]
    console.print(
        f"{output['model']}: prompt of {window} tokens, one token with {window} in a static cache, "
        f"{output['rounds']} rounds{'' if output['interleaved'] else ', one contender after another'}; "
        f"perplexity of {output['windows']} x {window} tokens"
    )
    results = {name: result for name, result in output["contenders"].items() if "absent" not in result}
    console.print(_table(results))
    for name, result in results.items():
        if "perplexity_against_emulation" in result:
            error = f" (standard error {result['standard_error']:.2%})" if "standard_error" in result else ""
            console.print(
                f"{name}: perplexity {result['perplexity_against_emulation']:+.2%}{error} "
                "against an eager LLM.int8() emulation"
            )
        if "report" in result:
            console.print(
                f"{name}: {result['report']['rewritten']} linears in int8 on {', '.join(result['report']['providers'])}"
            )
    for name, result in output["contenders"].items():
        if "absent" in result:
            console.print(f"[yellow]absent[/]: {name}: {result['absent']}")
    if rows:
        console.print(targets.table(rows, "targets"))


def _table(results: dict[str, dict[str, Any]]) -> rich.table.Table:
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        pad_edge=False,
        caption="speed: the fastest float is 1; logits: distance from the first float's, prompt and token",
        caption_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    heads = (f"{key}, ms\nmin - max" for key in ("prompt", "all logits", "token"))
    for name in (*(cell for head in heads for cell in (head, "speed")), "perplex-\nity", "logits\nerror"):
        table.add_column(name, justify="right")
    for name, result in results.items():
        cells = []
        for key in ("prompt", "all_logits", "token"):
            timing = result.get(f"{key}_ms")
            speed = result.get(f"{key}_speedup")
            cells += [str(Timing(**timing)) if timing else "", f"{speed:.2f}" if speed else ""]
        perplexity = common.significant(result["perplexity"], 5) if "perplexity" in result else ""
        errors = result.get("logits_error", {}).values()
        table.add_row(name, *cells, perplexity, "\n".join(f"{error:.1e}" for error in errors))
    return table
