"""``int8compile tune``: what it prints, keeps and removes. The times are made up."""

import json

import pytest
import torch
from typer.testing import CliRunner

from int8compile.cli.commands import app
from int8compile.native import loader, tuned
from int8compile.tuning import tune
from int8compile.tuning.measure import Case
from int8compile.tuning.request import COMMON, Request

runner = CliRunner()
KEYS = {"dtype": "float32", "heads": 6, "kv_heads": 2}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Measures one made-up case, of which the other form is twice as fast; lists what was asked for."""
    loader.load("cpu")
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INT8COMPILE_IGNORE_TUNED")
    tuned.forget()
    now, requests = [0.0], []

    def takes(seconds):
        return lambda count: now.__setitem__(0, now[0] + seconds * count)

    def cases(request):
        requests.append(request)
        forms = {"folded": takes(1e-4), "as it is": takes(5e-5)}
        return [Case("fold_queries", tuned.where_of(**KEYS), "6/2 heads", "folded", lambda: forms)]

    monkeypatch.setattr(tune, "_cases", cases)
    monkeypatch.setattr(tune, "run", lambda *args, real=tune.run: real(*args, lambda: now[0]))
    yield requests
    monkeypatch.setenv("INT8COMPILE_IGNORE_TUNED", "1")
    tuned.forget()
    tuned.apply_to_kernels()


def invoke(*arguments, code=0):
    result = runner.invoke(app, ["tune", *arguments])
    assert result.exit_code == code, result.output
    return result


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("tuned-*.json"))


def test_choices_are_printed_and_kept_and_doctor_tells_of_them(asked, tmp_path):
    result = invoke("--threads", "2")
    text = " ".join(result.stdout.split())
    assert "fold_queries 6/2 heads folded, 100.0 us as it is, 50.0 us 2.00x" in text
    assert "fold_queries: 1 of 1 differ from the defaults (2 threads," in text
    assert f"kept in {files(tmp_path)[0].name}" in text.replace(f"{tmp_path / 'cache'}/", "")
    assert asked == [COMMON]
    said = " ".join(runner.invoke(app, ["doctor"]).stdout.split())
    assert "tuned 1 choices for 2 threads on" in said
    assert "up to 2.00 times as fast" in said


def test_json_is_one_document(asked):
    found = json.loads(invoke("--json", "--dry-run").stdout)
    assert found["threads"] == torch.get_num_threads()
    assert found["decisions"][0]["where"] == KEYS
    assert found["path"] is None


def test_a_dry_run_keeps_nothing(asked, tmp_path):
    assert "kept nothing" in invoke("--dry-run").stdout
    assert files(tmp_path) == []


def test_what_was_kept_is_removed(asked, tmp_path):
    invoke()
    path = files(tmp_path)[0]
    assert json.loads(invoke("--clear", "--json").stdout) == {"removed": str(path)}
    assert files(tmp_path) == []
    assert "there was no tuned table" in invoke("--clear").stdout
    assert len(asked) == 1


def test_shapes_and_models_are_asked_for(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned_models.py").write_text(
        "import torch\ndef wide():\n    return torch.nn.Linear(256, 384), (torch.ones(2, 256),)\n"
    )
    invoke("--shapes", "576x1536,2048x2048", "--dry-run")
    invoke("tuned_models:wide", "--shapes", "576x1536", "--dry-run")
    assert asked[0] == Request(((576, 1536), (2048, 2048)), (), ())
    assert asked[1] == Request(((576, 1536), (256, 384)), (), (torch.float32,))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--shapes", "576"], 2, "expected K x N of weights"),
        (["--shapes", "576x0"], 2, "is none"),
        (["--threads", "0"], 2, "threads"),
        (["--seconds", "0"], 2, "seconds"),
        (["no_such_module:model"], 1, "expected module:function"),
    ],
)
def test_wrong_usage_is_told(asked, arguments, code, message):
    result = invoke(*arguments, code=code)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""


def test_times_that_tell_nothing_are_a_failure(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.Tuning, "unsteady", property(lambda tuning: True))
    result = invoke(code=1)
    assert "the times are too unsteady to tell anything" in " ".join(result.stderr.split())
    assert "kept nothing" in result.stdout
    assert files(tmp_path) == []


def test_a_folder_that_cannot_be_written_to_is_named(asked, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    result = invoke(code=1)
    assert result.stderr.startswith(f"int8compile: the cache folder {tmp_path / 'file' / 'cache'} is not used")
    assert "set INT8COMPILE_CACHE_DIR to a folder of your own" in " ".join(result.stderr.split())
    assert asked == []  # nor is anything measured that could not be kept
