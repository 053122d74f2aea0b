"""The picture of README and the documents: ``docs/images/measured.svg``, from ``benchmarks/results/cpu-avx2.json``.

    python -m benchmarks.overview

One model, each contender a row, and a column each for a prompt, a token, the weights' memory and perplexity. All
numbers are those of ``python -m benchmarks.model --peers``; what it did not measure is marked. The SVG is written
directly, not by matplotlib, so that the file is small and the same from run to run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import escape

from benchmarks import common

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/cpu-avx2.json"
PICTURE = ROOT / "docs/images/measured.svg"
MODEL = "model SmolLM2-135M"

ROWS = {
    "float32-int8-head": "int8compile, lm_head too",
    "float32-int8": "int8compile",
    "float32-inductor": "float32, inductor",
    "float32-frozen": "float32, inductor frozen",
    "float32-torchao-weights": "torchao, weights alone",
    "float32-torchao": "torchao, dynamic",
    "float32-bitsandbytes": "bitsandbytes",
    "float32-onnxruntime": "ONNX Runtime, dynamic",
    "q8_0-llama.cpp": "llama.cpp, Q8_0",
}

LABELS, COLUMN, BAR, LINE, TOP = 190, 195, 120, 22, 62


class Column(NamedTuple):
    """A panel: its title, a contender's number, the number at which bars are cut, and how numbers are written."""

    title: str
    value: Callable[[dict[str, Any]], float | None]
    end: float
    text: Callable[[float], str]


COLUMNS = (
    Column("prompt of 512 tokens, ms", lambda c: c["prompt_ms"]["median"], 2500, lambda v: common.significant(v)),
    Column("one more token, ms", lambda c: c["token_ms"]["median"], 190, lambda v: common.significant(v)),
    Column("weights read, MiB", lambda c: _mib(c), 560, lambda v: f"{v:.0f}"),
    Column("perplexity", lambda c: c.get("perplexity"), 25, lambda v: f"{v:.2f}"),
)


def picture(results: dict[str, Any]) -> str:
    """The SVG's text."""
    result = results[MODEL]
    contenders = dict(result["contenders"])
    # The float models read the weights that the report counts as before.
    before = contenders["float32-int8"]["report"]["weight_bytes_before"]
    for name in ("float32-inductor", "float32-frozen"):
        contenders[name] = {**contenders[name], "report": {"weight_bytes_after": before}}
    width, height = LABELS + COLUMN * len(COLUMNS), TOP + LINE * len(ROWS) + 8
    machine = common.machine_line(result["machine"])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="20" font-weight="bold">SmolLM2-135M in float32 on {escape(machine)}. '
        "Shorter is better.</text>",
    ]
    for i, name in enumerate(ROWS):
        weight = ' font-weight="bold"' if "int8compile" in ROWS[name] else ""
        lines.append(f'<text x="8" y="{TOP + LINE * i + 15}"{weight}>{escape(ROWS[name])}</text>')
    for c, column in enumerate(COLUMNS):
        x = LABELS + COLUMN * c
        lines.append(f'<text x="{x}" y="{TOP - 8}" font-weight="bold">{column.title}</text>')
        for i, name in enumerate(ROWS):
            lines += _bar(column, column.value(contenders[name]), x, TOP + LINE * i, ours="int8compile" in ROWS[name])
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(column: Column, value: float | None, x: int, y: int, *, ours: bool) -> list[str]:
    if value is None:
        return [f'<text x="{x}" y="{y + 15}" fill="#888">not measured</text>']
    length = round(BAR * min(value / column.end, 1))
    # A bar that is cut has an open end.
    cut = " →" if value > column.end else ""
    color = "#3f51b5" if ours else "#b0b7c3"
    return [
        f'<rect x="{x}" y="{y + 4}" width="{length}" height="{LINE - 8}" fill="{color}"/>',
        f'<text x="{x + length + 4}" y="{y + 15}">{cut.strip()} {column.text(value)}</text>'.replace("> ", ">"),
    ]


def _mib(contender: dict[str, Any]) -> float | None:
    report = contender.get("report")
    return report["weight_bytes_after"] / 2**20 if report else None


def main() -> None:
    """Draw the picture anew."""
    PICTURE.write_text(picture(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
