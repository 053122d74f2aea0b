"""What ``benchmarks.gpu`` found, for people: tables, the targets, a plot."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

BIG = ((4096, 14336), (14336, 4096), (8192, 28672))
#: M -> at least so many times as fast as bf16, with 4 outlier columns
TARGETS = {1: 1.7, 8: 1.7, 64: 1.6, 512: 1.45, 4096: 1.5}
SMALL_TARGETS = {1: 1.4, 512: 1.3, 4096: 1.4}  # 4096 x 4096
OURS = "int8, 4 outliers"


def is_sound(results: dict[str, Any]) -> bool:
    """Whether every check ran to its end and found nothing."""
    return not problems(results)


def problems(results: dict[str, Any]) -> list[str]:
    found = []
    for name, section in results["sections"].items():
        result = section["result"] or {}
        if section["status"] != "ok":
            last = (section.get("error", "").strip().splitlines() or [""])[-1]
            found.append(f"{name}: {section['status']} {last}".strip())
        found += [f"{name}: {failure}" for failure in result.get("failures", [])[:10]]
        if result.get("complete") is False:
            found.append(f"{name}: ran out of time before its end")
    return found


def write(results: dict[str, Any], out: Path, console: Console) -> None:
    """table.txt and speedup.png; the tables on the console too."""
    text = io.StringIO()
    for target in (console, Console(file=text, width=140)):
        for table in tables(results):
            target.print(table)
        for line in problems(results) or ["All checks passed."]:
            target.print(line, markup=False, highlight=False)
    (out / "table.txt").write_text(text.getvalue())
    try:
        _plot(results, out / "speedup.png")
    except ImportError as error:
        console.print(f"no plot: {error}")


def cases(results: dict[str, Any]) -> dict[tuple[int, int, int], dict[str, float]]:
    """(K, N, M) -> contender -> microseconds, of both timing sections."""
    found: dict[tuple[int, int, int], dict[str, float]] = {}
    for name in ("layers", "peers"):
        section = results["sections"].get(name) or {}
        for case in (section.get("result") or {}).get("cases", []):
            found.setdefault((case["k"], case["n"], case["m"]), {}).update(case["us"])
    return found


def tables(results: dict[str, Any]) -> list[Table]:
    return [table for table in (_layers(results), _model(results)) if table.row_count]


def _layers(results: dict[str, Any]) -> Table:
    table = Table(title="one linear, microseconds", box=rich.box.SIMPLE_HEAD)
    for column in ("K x N", "M", "bf16", "int8", "x bf16", "target", "64 outliers", "bandwidth", "other times"):
        table.add_column(column, justify="left" if column in ("K x N", "other times") else "right")
    copy = ((results["sections"].get("layers") or {}).get("result") or {}).get("copy_bytes_per_us", 0)
    for (k, n, m), us in cases(results).items():
        ours, bf16 = us.get(OURS), us.get("bf16")
        ratio = bf16 / ours if ours and bf16 else None
        target = (TARGETS if (k, n) in BIG else SMALL_TARGETS if (k, n) == (4096, 4096) else {}).get(m)
        many, none = us.get("int8, 64 outliers"), us.get("int8, 0 outliers")
        cost = many / none - 1 if many and none else None
        shown = ("bf16", OURS, "int8, 64 outliers", "int8, 0 outliers")
        table.add_row(
            f"{k} x {n}",
            str(m),
            f"{bf16:.1f}" if bf16 else "",
            f"{ours:.1f}" if ours else "",
            f"{ratio:.2f}" if ratio else "",
            f"{target} {'met' if ratio and ratio >= target else 'missed'}" if target else "",
            f"{100 * cost:+.0f} %" if cost is not None else "",
            f"{100 * n * k / ours / copy:.0f} %" if ours and copy and m <= 64 else "",
            ", ".join(f"{name} {value:.1f}" for name, value in us.items() if name not in shown),
        )
    return table


def _model(results: dict[str, Any]) -> Table:
    result = (results["sections"].get("model") or {}).get("result") or {}
    contenders = list(result.get("ms", {}))
    table = Table("step", *contenders, "x bf16", title="Llama-3.1-8B's shape, milliseconds", box=rich.box.SIMPLE_HEAD)
    for step in result.get("ms", {}).get("bf16", {}):
        times = [result["ms"][name].get(step) for name in contenders]
        int8, bf16 = result["ms"].get("int8", {}).get(step), result["ms"]["bf16"][step]
        table.add_row(step, *(f"{t:.2f}" if t else "" for t in times), f"{bf16 / int8:.2f}" if int8 else "")
    return table


def _plot(results: dict[str, Any], file: Path) -> None:
    """Speed of int8 relative to bf16, a group of bars for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {key: us["bf16"] / us[OURS] for key, us in cases(results).items() if "bf16" in us and OURS in us}
    if not found:
        return
    shapes = list(dict.fromkeys(key[:2] for key in found))
    rows = sorted({key[2] for key in found})
    figure, axes = pyplot.subplots(figsize=(10, 4.5), layout="constrained")
    width = 0.8 / len(rows)
    for i, m in enumerate(rows):
        values = [found.get((*shape, m), 0.0) for shape in shapes]
        axes.bar([x + i * width for x in range(len(shapes))], values, width, label=f"M = {m}")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(shapes))], [f"{k} x {n}" for k, n in shapes])
    axes.set_xlabel("K x N")
    axes.set_ylabel("times as fast as bf16 F.linear")
    axes.set_title("int8 linear with 4 outlier columns, quantisation included")
    axes.legend()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
