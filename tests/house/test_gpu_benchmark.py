"""``benchmarks.gpu`` rehearsed on a CPU: what runs on a rented GPU should not fail there for a typing mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks.gpu import checks, report


def rehearse(out: Path, only: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--out", str(out), "--only", only]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    results = json.loads((out / "results.json").read_text())
    assert done.returncode == 0, (done.stdout, results)
    return results


def test_checks_run_and_report(tmp_path):
    sections = rehearse(tmp_path, "correctness,graphs")["sections"]
    assert sections["correctness"]["result"]["checked"] == 3 * 2 * 4 * 3
    assert sections["correctness"]["result"]["failures"] == []
    assert "GPU" in sections["graphs"]["result"]["skipped"]
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


def test_a_wrong_output_is_seen():
    run = checks.Run(Path(), True, 0.0)
    checks.load(run)
    for dtype in checks.DTYPES:
        args = checks.problem(run, 5, 24, 64, dtype, 3)
        out, want = checks.linear(*args, 6.0, "column"), checks.gold(*args, "column")
        assert checks.wrong(out, want, dtype) == ""
        off = out.clone()
        off[2, 3] += 0.1 * out.abs().max()
        assert "times the error" in checks.wrong(off, want, dtype)
        off[2, 3] = float("nan")
        assert "NaN" in checks.wrong(off, want, dtype)
        assert "instead of" in checks.wrong(out[:1], want, dtype)
        assert checks.wrong(out, torch.where(want == want[1, 1], float("nan"), want), dtype)


def test_failures_and_missed_ends_are_problems():
    section = {"status": "ok", "seconds": 1.0, "result": {"failures": ["M=1: wrong"], "complete": True}}
    results = {"sections": {"correctness": section, "model": {"status": "failed", "result": None, "error": "a\nb"}}}
    assert report.problems(results) == ["correctness: M=1: wrong", "model: failed b"]
    results = {"sections": {"correctness": {"status": "ok", "result": {"complete": False}}}}
    assert report.problems(results) == ["correctness: ran out of time before its end"]


@pytest.mark.parametrize(
    ("text", "sound"),
    [
        ("ERROR SUMMARY: 0 errors", True),
        ("ERROR SUMMARY: 10 errors", False),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("RACECHECK SUMMARY: 10 hazards displayed (0 errors, 10 warnings)", False),
        ("took too long", False),
        ("exit code -11: ", False),
    ],
)
def test_what_the_sanitizer_says(text, sound):
    results = {"sections": {"sanitizer": {"status": "ok", "result": {"memcheck": text}}}}
    assert report.problems(results) == ([] if sound else [f"memcheck: {text}"])
