"""``benchmarks.gpu`` rehearsed on a CPU: what runs on a rented GPU should not fail there for a typing mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.gpu import report


def rehearse(out: Path, only: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    results = json.loads((out / "results.json").read_text())
    assert done.returncode == 0, (done.stdout, results)
    return results


def test_checks_run_and_report(tmp_path):
    sections = rehearse(tmp_path, "correctness,graphs")["sections"]
    assert sections["correctness"]["result"]["checked"] >= 6
    assert sections["correctness"]["result"]["failures"] == []
    assert all("GPU" in reason for reason in sections["graphs"]["result"]["skipped"])
    assert "All checks passed" in (tmp_path / "table.txt").read_text()


@pytest.mark.slow
def test_everything_runs(tmp_path):
    results = rehearse(tmp_path, "build,streams,sanitizer,layers,peers,model")
    assert {section["status"] for section in results["sections"].values()} == {"ok"}
    (first, *_) = results["sections"]["layers"]["result"]["cases"]
    assert {"bf16", "int8, 4 outliers", "product alone", "quantise"} <= set(first["us"]), first["absent"]
    assert "prompt" in results["sections"]["model"]["result"]["ms"]["int8"]
    assert results["sections"]["model"]["result"]["distance"]["int8, prompt"] < 0.2
    text = (tmp_path / "table.txt").read_text()
    assert "one linear" in text
    assert "Llama" in text


@pytest.mark.slow
def test_a_failure_and_too_little_time_are_in_the_results(tmp_path):
    """Of a section's tests: what failed, what was left out and why, and whether the end was reached."""
    tests = tmp_path / "test_three.py"
    tests.write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 2 + 2 == 5, 'two and two'\n"
        "def test_absent(): pytest.skip('no GPU')\n"
    )
    code = (
        "import json, sys, time; from pathlib import Path; from benchmarks.gpu import checks, section\n"
        "run = section.Run(Path(sys.argv[1]), True, time.monotonic() + float(sys.argv[2]))\n"
        "run.save('result', checks.check(run, 'tests', sys.argv[3]))"
    )
    results = []
    for seconds in (600, 0):
        command = [sys.executable, "-c", code, str(tmp_path), str(seconds), str(tests)]
        subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
        results.append(json.loads((tmp_path / "result.json").read_text()))
    in_time, too_late = results
    (failure,) = in_time["failures"]
    assert failure.startswith("test_wrong: AssertionError: two and two")
    assert (in_time["checked"], in_time["complete"]) == (1, True)
    assert in_time["skipped"] == ["test_absent: Skipped: no GPU"]
    assert (too_late["checked"], too_late["complete"]) == (0, False)


def test_failures_and_missed_ends_are_problems():
    section = {"status": "ok", "seconds": 1.0, "result": {"failures": ["M=1: wrong"], "complete": True}}
    results = {"sections": {"correctness": section, "model": {"status": "failed", "result": None, "error": "a\nb"}}}
    assert report.problems(results) == ["correctness: M=1: wrong", "model: failed b"]
    results = {"sections": {"correctness": {"status": "ok", "result": {"complete": False}}}}
    assert report.problems(results) == ["correctness: ran out of time before its end"]
