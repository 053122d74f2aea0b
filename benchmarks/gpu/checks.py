"""The checks of ``benchmarks.gpu``: ``tests/kernels/test_gpu.py``, a class a section, and what came of it as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.section import Run

TESTS = Path(__file__).resolve().parents[2] / "tests" / "kernels" / "test_gpu.py"


class Outcomes:
    """A plugin for pytest that keeps a section's results up to date, and stops before its time is over."""

    def __init__(self, run: Run, section: str) -> None:
        self.run, self.section = run, section
        self.out_of_time = False
        self.result: dict[str, Any] = {"checked": 0, "skipped": [], "failures": [], "complete": False}

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.run.left() < 5:
            self.out_of_time = True
            item.session.shouldstop = "out of time"
            pytest.skip("out of time")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.split("::", 1)[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = getattr(crash, "message", str(report.longrepr)).splitlines() or [""]
            self.result["failures"].append(f"{name}: {said[0]}")
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.result["skipped"].append(f"{name}: {reason}")
        elif report.when == "call":
            self.result["checked"] += 1
        self.run.save(self.section, self.result)


def check(run: Run, section: str, tests: str) -> dict[str, Any]:
    """Run tests here, by their address in pytest's notation.

    Raises:
        RuntimeError: they could not be run.
    """
    outcomes = Outcomes(run, section)
    code = pytest.main(["-p", "no:cacheprovider", tests], plugins=[outcomes])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not outcomes.out_of_time:
        raise RuntimeError(f"pytest ended with {code!r}")
    return {**outcomes.result, "complete": not outcomes.out_of_time}


def correctness(run: Run) -> dict[str, Any]:
    """Results of every kernel against float64, with NaN and Inf in a row; codes, scales and columns to the bit."""
    return check(run, "correctness", f"{TESTS}::TestResults")


def graphs(run: Run) -> dict[str, Any]:
    """CUDA graphs, by hand and by ``mode="reduce-overhead"``, replayed with outliers in other columns, and in more."""
    return check(run, "graphs", f"{TESTS}::TestGraphs")


def streams(run: Run) -> dict[str, Any]:
    """The same linears on several streams at once, and on every GPU."""
    return check(run, "streams", f"{TESTS}::TestStreams")


def sanitizer(run: Run) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over every kernel at small sizes."""
    return check(run, "sanitizer", f"{TESTS}::TestSanitizer")
