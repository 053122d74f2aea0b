"""Everything there is to know about the CUDA kernels on a GPU, in one command and under nine minutes.

    python -m benchmarks.gpu --out gpu-results
    python -m benchmarks.gpu --dry-run --out /tmp/gpu     # tiny sizes, on the CPU: does the script itself work?

Builds; checks the results against float64, in every kernel; replays CUDA graphs with other outliers than they were
captured with; runs compute-sanitizer; and only then times linears and a model of Llama-3.1-8B's shape against bf16,
``torch._int_mm``, torchao and bitsandbytes. Each section is a process of its own with a time limit: what fails, hangs,
or loses its CUDA context takes nothing else with it. Results are written after every section: results.json, table.txt
and speedup.png.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console

from benchmarks.gpu import checks, model, report, times
from benchmarks.gpu.checks import Run


class Section(NamedTuple):
    """One part of the command: what it does, and the most seconds it may take."""

    run: Callable[[Run], Any]
    seconds: int


SECTIONS = {
    "build": Section(checks.build, 210),  # nearly all of it only if the proof of the wgmma kernels hangs
    "correctness": Section(checks.correctness, 80),
    "graphs": Section(checks.graphs, 50),
    "streams": Section(checks.streams, 30),
    "sanitizer": Section(checks.sanitizer, 80),
    "layers": Section(times.layers, 110),
    "model": Section(model.model, 130),
    "peers": Section(times.peers, 100),
}


def main(
    out: Annotated[Path, typer.Option(help="folder for results.json, table.txt and speedup.png")] = Path("gpu-results"),
    minutes: Annotated[float, typer.Option(help="all sections together; what does not fit is left out")] = 8.7,
    only: Annotated[str, typer.Option(help="sections, comma-separated")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="tiny sizes on the CPU")] = False,
    section: Annotated[str, typer.Option(hidden=True, help="run this one section here")] = "",
) -> None:
    """Check the CUDA kernels, then time them."""
    names = [name for name in (only or ",".join(SECTIONS)).split(",") if name]
    for name in [*names, *([section] if section else [])]:
        if name not in SECTIONS and name != "sanitized":
            raise typer.BadParameter(f"{name!r}; expected some of {', '.join(SECTIONS)}", param_hint="--only")
    out.mkdir(parents=True, exist_ok=True)
    if section:
        _run_here(section, Run(out, dry_run, time.monotonic() + 60 * minutes))
        return
    console, started = Console(), time.monotonic()
    results: dict[str, Any] = {"dry_run": dry_run, "sections": {}}
    for name in names:
        left = 60 * minutes - (time.monotonic() - started)
        results["sections"][name] = _run_apart(
            name, out, dry_run, 600 if dry_run else min(left, SECTIONS[name].seconds)
        )
        done = results["sections"][name]
        console.print(f"{name}: {done['status']} ({done['seconds']:.0f} s)")
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    results["seconds"] = round(time.monotonic() - started, 1)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.write(results, out, console)
    raise typer.Exit(0 if report.is_sound(results) else 1)


def _run_apart(name: str, out: Path, dry_run: bool, seconds: float) -> dict[str, Any]:
    """A section's outcome, from a process of its own: status, seconds, result and, where it failed, error."""
    if seconds < 10:
        return {"status": "left out: no time", "seconds": 0.0, "result": None}
    file, started = out / f"{name}.json", time.monotonic()
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--out", str(out)]
    command += ["--minutes", f"{(seconds - 5) / 60:.3f}", *(["--dry-run"] if dry_run else [])]
    status, error = "ok", ""
    # In a process group, so that what the section has started ends with it.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=seconds)
        if process.returncode != 0:
            status, error = f"failed, exit code {process.returncode}", said[-4000:]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        status, error = "took too long", process.communicate()[1][-4000:]
    # A section that did not end has left what it had.
    result = json.loads(file.read_text()) if file.exists() else None
    file.unlink(missing_ok=True)
    found = {"status": status, "seconds": round(time.monotonic() - started, 1), "result": result}
    return {**found, "error": error} if error else found


def _run_here(name: str, run: Run) -> None:
    function = checks.sanitized if name == "sanitized" else SECTIONS[name].run
    try:
        result = function(run)
    except Exception:
        traceback.print_exc()
        raise typer.Exit(1) from None
    run.save(name, result)


if __name__ == "__main__":
    typer.run(main)
