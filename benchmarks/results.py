"""Results as a table and a plot: ``benchmarks/results/cpu-avx2.{json,md,svg}``, named by what ran the int8 kernels.

    python -m benchmarks.linear --json linear.json
    python -m benchmarks.model --peers --json model.json
    python -m benchmarks.results linear.json model.json

Puts the results of each benchmark (linear, model, calls) beside those that are there already for the same hardware, in
the place of older ones of the same kind and model, and draws the table and the plot anew from all of them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import common

FOLDER = Path(__file__).resolve().parent / "results"


def main(
    files: Annotated[list[Path], typer.Argument(help="JSON files of benchmarks.linear, .model and .calls")],
    folder: Annotated[Path, typer.Option(help="where the results are kept")] = FOLDER,
) -> None:
    """Take in results, and write the table and the plot."""
    folder.mkdir(parents=True, exist_ok=True)
    changed: dict[str, dict[str, Any]] = {}
    for file in files:
        new = json.loads(file.read_text())
        if new.get("kind") not in ("linear", "model", "calls"):
            raise typer.BadParameter(f"{file}: no result of benchmarks.linear, .model or .calls", param_hint="FILES")
        stem = name_of(new)
        if stem not in changed:
            old = folder / f"{stem}.json"
            changed[stem] = json.loads(old.read_text()) if old.exists() else {}
        changed[stem][key_of(new)] = for_others(new)
        typer.echo(f"{file} -> {folder / stem}.{{json,md,svg}} ({key_of(new)})")
    for stem, results in changed.items():
        # Keys in order, so that a run changes only its own lines.
        (folder / f"{stem}.json").write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        (folder / f"{stem}.md").write_text(markdown(stem, results))
        plot(results, folder / f"{stem}.svg")


def name_of(result: dict[str, Any]) -> str:
    """``cpu-avx2``, by the instruction set of our kernels; ``cuda-nvidia-h200`` and the like on a GPU."""
    providers = [*result["machine"].get("providers", [])]
    for contender in result.get("contenders", {}).values():
        providers += contender.get("report", {}).get("providers", [])
    for provider in providers:
        match = re.fullmatch(r"native (\S+) \(cpu\)", provider)
        if match:
            return f"cpu-{match[1]}"
        if provider.endswith("(cuda)"):
            return "cuda-" + re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    return "cpu-reference"


def key_of(result: dict[str, Any]) -> str:
    """``linear``; ``model SmolLM2-135M-Instruct``: no folder of the machine's."""
    if result["kind"] == "linear":
        return "linear"
    return f"{result['kind']} {model_name(result)}"


def for_others(result: dict[str, Any]) -> dict[str, Any]:
    """The result without what concerns its machine's folders, and of reports only what they sum up to."""
    if "model" not in result:
        return result
    contenders = {}
    for name, contender in result.get("contenders", {}).items():
        report = contender.get("report", {})
        kept = {
            key: report[key]
            for key in ("providers", "rewritten", "weight_bytes_before", "weight_bytes_after")
            if report
        }
        contenders[name] = {**contender, "report": kept} if report else contender
    return {**result, "model": model_name(result)} | ({"contenders": contenders} if contenders else {})


def model_name(result: dict[str, Any]) -> str:
    return str(result["model"]).rstrip("/").rsplit("/", 1)[-1].removeprefix("shape:")


def markdown(stem: str, results: dict[str, Any]) -> str:
    """All results as Markdown: what ran, each benchmark's table, absent contenders with reasons, targets."""
    lines = [f"# {stem}", "", f"![times]({stem}.svg)"]
    for key in sorted(results):
        result = results[key]
        lines += ["", f"## {key}", "", common.machine_line(result["machine"]) + ".", ""]
        lines += {"linear": _linear_lines, "model": _model_lines, "calls": _calls_lines}[result["kind"]](result)
        absent = _absent(result)
        if absent:
            lines += ["", "Absent:", ""] + [f"- {', '.join(names)}: {reason}" for reason, names in absent.items()]
        targets = result.get("targets") or {}
        for dtype, rows in targets.items() if isinstance(targets, dict) else [("", targets)]:
            if rows:
                lines += ["", f"### Targets{f', activations in {dtype}' if dtype else ''}", ""]
                lines += _table(["speed against", "limit", "worst", "case", "met", "verdict"], map(_target_cells, rows))
    return "\n".join(lines) + "\n"


def _table(head: list[str], rows: Any) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell) for cell in row) + " |" for row in cells]


def _target_cells(row: dict[str, Any]) -> list[str]:
    sign = "<=" if row["at_most"] else ">="
    value = "" if row["value"] is None else f"{row['value']:.2f}"
    met = f"{row['met']}/{row['of']}" if row["of"] else ""
    return [row["target"], f"{sign} {row['limit']:g}", value, row["worst"], met, row["verdict"]]


def _linear_lines(result: dict[str, Any]) -> list[str]:
    rotated = result["rotated_bytes"]
    memory = (
        f"weights read from memory up to M = {result['rotated_rows']}" if rotated else "weights may be in the cache"
    )
    lines = [f"Microseconds of one linear (medians of {result['rounds']} rounds, in turns; {memory}).", ""]
    cases = result["results"]
    names = list(dict.fromkeys(name for case in cases for name in case["contenders"]))
    head = ["K x N", "M", *names]
    rows = []
    for case in cases:
        times = [case["contenders"].get(name, {}).get("ms") for name in names]
        cells = ["absent" if t is None else common.significant(1e3 * t["median"]) for t in times]
        rows.append([f"{case['k']}x{case['n']}", case["m"], *cells])
    return lines + _table(head, rows)


def _model_lines(result: dict[str, Any]) -> list[str]:
    window = result["window"]
    turns = "in turns" if result["interleaved"] else "one after another"
    contenders = {name: c for name, c in result["contenders"].items() if "absent" not in c}
    keys = [key for key in ("prompt", "all_logits", "token") if any(f"{key}_ms" in c for c in contenders.values())]
    logits = "the last one's logits" if "all_logits" in keys else "all logits"
    lines = [
        f"A prompt of {window} tokens with {logits}, and one token with {window} in the cache: medians of "
        f"{result['rounds']} rounds, {turns}; speed: the fastest float is 1; logits: distance from the first float's.",
        "",
    ]
    rows = []
    for name, c in contenders.items():
        cells: list[str] = [name]
        for key in keys:
            timing, speed = c.get(f"{key}_ms"), c.get(f"{key}_speedup")
            cells += [common.significant(timing["median"]) if timing else "", f"{speed:.2f}" if speed else ""]
        cells.append(common.significant(c["perplexity"], 5) if "perplexity" in c else "")
        cells.append(" / ".join(f"{error:.1e}" for error in c.get("logits_error", {}).values()))
        rows.append(cells)
    times = [cell for key in keys for cell in (f"{key.replace('_', ' ')}, ms", "speed")]
    return lines + _table(["contender", *times, "perplexity", "logits"], rows)


def _calls_lines(result: dict[str, Any]) -> list[str]:
    dispatch = result["dispatch_us"]
    ours = {name: c for name, c in result["calls"].items() if name.startswith("int8compile::")}
    rows = [
        [name, f"{c['count']:g}", f"{dispatch[name]['no_grad']:.2f}"] for name, c in ours.items() if name in dispatch
    ]
    others = sum(c["count"] for name, c in result["calls"].items() if name not in ours)
    return [
        f"A decoded token in {result['dtype']} ({result['backend']}): {result['token_ms']['median']:.2f} ms, of which "
        f"the check of the weights takes {result['runner_us']:.0f} us; {others:g} operator calls are not ours.",
        "",
        *_table(["operator", "calls a token", "dispatch, us"], rows),
    ]


def _absent(result: dict[str, Any]) -> dict[str, list[str]]:
    """Reasons, and the contenders that are absent for them."""
    found: dict[str, list[str]] = {}
    groups = result["results"] if result["kind"] == "linear" else [result]
    for group in groups:
        for name, contender in group.get("contenders", {}).items():
            if "absent" in contender and name not in found.setdefault(contender["absent"], []):
                found[contender["absent"]].append(name)
    return found


def plot(results: dict[str, Any], file: Path) -> None:
    """Speed against the fastest float: a panel for each M of the linear benchmark, and one for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    linear = results.get("linear")
    rows = sorted({case["m"] for case in linear["results"]}) if linear else []
    models = [results[key] for key in sorted(results) if results[key]["kind"] == "model"]
    count = len(rows) + len(models)
    if count == 0:
        return
    columns = min(2, count)
    # Text as text keeps the file small, and a fixed salt and no date the same from run to run.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "int8compile", "font.size": 9}):
        figure, grid = pyplot.subplots(
            -(-count // columns), columns, figsize=(7 * columns, 3.6 * -(-count // columns)), squeeze=False
        )
        panels = list(grid.flat)
        for panel, m in zip(panels, rows, strict=False):
            _draw_linear(panel, [case for case in results["linear"]["results"] if case["m"] == m], m)
        for panel, model in zip(panels[len(rows) :], models, strict=False):
            _draw_model(panel, model)
        for panel in panels[count:]:
            panel.set_axis_off()
        for panel in panels[:count]:
            panel.axhline(1, color="0.5", linewidth=0.8)
            panel.set_ylabel("speed, fastest float = 1")
            panel.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        figure.tight_layout()
        figure.savefig(file, metadata={"Date": None})
        pyplot.close(figure)


def _draw_linear(panel: Any, cases: list[dict[str, Any]], m: int) -> None:
    names = list(dict.fromkeys(name for case in cases for name, c in case["contenders"].items() if "ms" in c))
    speeds = {name: [_speed(case["contenders"], name) for case in cases] for name in names}
    _bars(panel, [f"{case['k']}x{case['n']}" for case in cases], speeds)
    panel.set_title(f"one linear, M = {m}")


def _speed(contenders: dict[str, Any], name: str) -> float:
    floats = [c["ms"]["median"] for other, c in contenders.items() if other.startswith("linear.") and "ms" in c]
    timing = contenders.get(name, {}).get("ms")
    return min(floats) / timing["median"] if floats and timing else 0.0


def _draw_model(panel: Any, result: dict[str, Any]) -> None:
    timed = {name: c for name, c in result["contenders"].items() if "prompt_speedup" in c}
    speeds = {name: [c["prompt_speedup"], c["token_speedup"]] for name, c in timed.items()}
    _bars(panel, [f"prompt of {result['window']}", "one token"], speeds)
    panel.set_title(model_name(result))


def _bars(panel: Any, groups: list[str], series: dict[str, list[float]]) -> None:
    from matplotlib import colormaps

    width = 0.85 / max(1, len(series))
    colors = [colormaps["tab20"](i) for i in range(20)]
    for i, (name, heights) in enumerate(series.items()):
        ours = name.startswith("ours") or "int8" in name
        panel.bar(
            [g + (i - (len(series) - 1) / 2) * width for g in range(len(groups))],
            heights,
            width,
            label=name,
            color=f"C{i}" if len(series) <= 10 else colors[i % len(colors)],
            edgecolor="black" if ours else "none",
            linewidth=0.6,
        )
    panel.set_xticks(range(len(groups)), groups)


if __name__ == "__main__":
    typer.run(main)
