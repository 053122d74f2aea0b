"""``int8compile tune``'s answer as a table."""

from __future__ import annotations

import os
from collections import Counter

import rich.box
from rich.table import Table

from int8compile.cli.output import out
from int8compile.tuning.measure import Decision
from int8compile.tuning.tune import Tuning


def print_tuning(tuning: Tuning) -> None:
    """Print the choices that differ from the defaults, and how many do not."""
    if tuning.changes:
        table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "measured", "default", "tuned", "gain"):
            table.add_column(column, justify="right" if column == "gain" else "left", no_wrap=column != "measured")
        for decision in tuning.changes:
            taken = (_timed(decision, decision.default), _timed(decision, decision.choice), f"{decision.gain:.2f}x")
            table.add_row(decision.tunable, ", ".join(decision.labels), *taken)
        out.print(table, highlight=False, markup=False)
    counts = Counter(decision.tunable for decision in tuning.decisions)
    changed = Counter(decision.tunable for decision in tuning.changes)
    parts = [f"{name}: {changed[name]} of {count}" for name, count in counts.items()]
    said = f"{', '.join(parts)} differ from the defaults" if parts else "there is nothing to choose between here"
    out.print(f"{said} ({tuning.threads} threads, {tuning.seconds:.0f} s)", highlight=False, markup=False)
    if unsteady := sum(decision.unsteady for decision in tuning.decisions):
        out.print(f"the times of {unsteady} were too unsteady, which keep their defaults", highlight=False)
    cpus = os.cpu_count() or 1
    if tuning.load is not None and tuning.load > cpus / 2:
        busy = f"the machine was busy (load {tuning.load:.1f}, {cpus} CPUs)"
        out.print(f"{busy}: measure again when it is not", style="yellow", highlight=False)
    if tuning.left:
        out.print(f"no time for {len(tuning.left)} more, which keep their defaults: --seconds", highlight=False)
    out.print("kept nothing" if tuning.path is None else f"kept in {tuning.path}", highlight=False, markup=False)


def _timed(decision: Decision, form: str) -> str:
    return f"{form}, {1e6 * decision.seconds[form]:.1f} us"
