"""The ``int8compile`` command: what it prints, its exit codes, and that --json is one document."""

import json
import subprocess
import sys

import pytest
import torch
import typer
from typer.testing import CliRunner

from int8compile.cli.commands import app
from int8compile.native import loader, providers

runner = CliRunner()


def program(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "int8compile.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_doctor_tells_what_is_chosen_once_built():
    loader.load("cpu")
    loader.load("common")
    result = runner.invoke(app, ["doctor", "--json"])
    found = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert found["problems"] == []
    assert found["torch"] == torch.__version__
    assert found["kernels"]["chosen"] in found["kernels"]["available"]
    assert "portable" in found["kernels"]["available"]
    assert found["libraries"]["cpu"] == {
        "path": str(loader.binary_path("cpu")),
        "built": True,
        "problem": None,
    }
    text = runner.invoke(app, ["doctor"])
    assert text.exit_code == 0
    assert found["kernels"]["chosen"] in text.stdout


def test_doctor_names_the_missing_tool_and_builds_nothing(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = runner.invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no C++ compiler (no-such-compiler) was found: install" in result.stderr
    assert "not built yet" in result.stdout
    assert not empty_cache.exists()


def test_a_compiler_is_not_missed_where_all_is_built(monkeypatch):
    loader.load("cpu")
    loader.load("common")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert runner.invoke(app, ["doctor"]).exit_code == 0


@pytest.mark.slow  # compiles all kernels anew
def test_build_prints_where_and_leaves_what_is_there(empty_cache):
    # In processes of their own, since operators register once a process.
    first = json.loads(program("build", "--json").stdout)
    assert {name: built["path"] for name, built in first.items()} == {
        name: str(loader.binary_path(name)) for name in providers.wanted()
    }
    times = [loader.binary_path(name).stat().st_mtime_ns for name in providers.wanted()]
    assert program("build").stderr == ""
    assert [loader.binary_path(name).stat().st_mtime_ns for name in providers.wanted()] == times


def test_build_fails_with_the_reason_on_stderr(empty_cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = runner.invoke(app, ["build"])
    assert result.exit_code == 1
    assert "no C++ compiler (no-such-compiler) was found" in result.stderr
    assert result.stdout == ""


def test_wrong_usage_exits_with_2():
    assert runner.invoke(app, ["buidl"]).exit_code == 2


def test_every_command_has_json_and_an_example():
    for name in typer.main.get_command(app).commands:
        shown = runner.invoke(app, [name, "--help"]).stdout
        assert "--json" in shown, name
        assert f"int8compile {name}" in shown.split("Example:")[1], name


def test_it_runs_as_a_program():
    shown = program("--help").stdout
    assert "Exit codes: 0 done; 1" in " ".join(shown.split())
    assert "doctor" in shown
    assert "build" in shown


def test_what_cannot_be_packaged_or_written_is_said_in_one_line(tmp_path):
    """(1) a folder (2) a damaged program (3) a target that is read-only (4) a target with a file in its path."""
    (tmp_path / "damaged.pt2").write_bytes(b"PK" + bytes(100))
    (tmp_path / "kept.pt2").write_text("kept")
    (tmp_path / "kept.pt2").chmod(0o444)
    for arguments, message in (
        (["package", str(tmp_path), "out.pt2"], "is a folder; expected a file of int8compile.save"),
        (["package", str(tmp_path / "damaged.pt2"), "out.pt2"], "is truncated, or not a file of int8compile.save"),
        (["export", "torch.nn:Identity", str(tmp_path / "kept.pt2")], "is read-only; remove it"),
        (["export", "torch.nn:Identity", str(tmp_path / "kept.pt2" / "m.pt2")], "there is no folder"),
    ):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 1, result.output
        assert message in " ".join(result.stderr.split())
        assert result.stdout == ""
    assert (tmp_path / "kept.pt2").read_text() == "kept"
    assert not (tmp_path / "out.pt2").exists()
