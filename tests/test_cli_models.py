"""``explain``, ``export`` and ``package``: a model named on the command line becomes a program and a package."""

import json

import pytest
import torch
from model_zoo import llama, tokens
from typer.testing import CliRunner

import int8compile
from int8compile.cli import app

runner = CliRunner()
SOURCE = """
import torch
from torch import nn

def tiny():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, (torch.ones(2, 8),), {}, ({0: torch.export.Dim.DYNAMIC},)

def wrong():
    return 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, code: int = 0):
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_a_function_of_ones_own(folder):
    explained = json.loads(run("explain", "models_of_mine:tiny", "--min-features", "0", "--json").stdout)
    assert [(site["path"], site["reason"]) for site in explained["sites"]] == [("0", "REWRITTEN"), ("2", "REWRITTEN")]
    assert "TOO_SMALL" in run("explain", "models_of_mine:tiny").stdout
    options = ("--min-features", "0", "--skip", "2", "--json")
    exported = json.loads(run("export", "models_of_mine:tiny", "tiny.pt2", *options).stdout)
    assert exported["report"]["rewritten"] == 1
    assert exported["bytes"] == (folder / "tiny.pt2").stat().st_size
    assert int8compile.load("tiny.pt2").module()(torch.ones(5, 8)).shape == (5, 4)


@pytest.mark.slow
def test_a_transformers_folder_through_to_its_package(folder):
    llama().eval().save_pretrained("llama")
    shown = run("export", "llama", "llama.pt2", "--min-features", "0").stdout
    assert "14 of 15 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)" in shown
    run("package", "llama.pt2", "llama.aoti.pt2")
    ids = tokens(5)
    expected = int8compile.load("llama.pt2").module()(input_ids=ids)["logits"]
    torch.testing.assert_close(int8compile.load_package("llama.aoti.pt2")(input_ids=ids)["logits"], expected)


def test_mistakes_exit_with_1_and_their_reason(folder):
    for arguments, reason in (
        (("explain", "models_of_mine:big"), "has no attribute 'big'; expected module:function"),
        (("explain", "nowhere:tiny"), "No module named 'nowhere'"),
        (("export", "models_of_mine:wrong", "x.pt2"), "wrong() returned int; expected (model, args"),
        (("export", "models_of_mine:tiny", "x.pt"), "expected one that ends in '.pt2'"),
        (("package", "nothing.pt2", "x.pt2"), "there is no file 'nothing.pt2'"),
        (("package", "models_of_mine.py", "x.pt2"), "not a file of int8compile.save at all"),
    ):
        result = run(*arguments, code=1)
        assert reason in result.stderr.replace("\n", " "), result.stderr
        assert result.stdout == ""
    run("export", "models_of_mine:tiny", code=2)
