"""``int8compile calibrate`` and ``int8compile compare``."""

import json

import pytest
from command_line import run

from int8compile import Calibration

SOURCE = """
import torch

def tiny():
    torch.manual_seed(0)
    x = torch.randn(6, 128)
    x[:, 5] *= 90
    return torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 128)), (x,)

def both():
    return tiny()[0], (torch.ones(2, 128),), {"more": 1}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "calibrated_models.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_calibration_goes_from_command_to_command(folder):
    made = json.loads(run("calibrate", "calibrated_models:tiny", "--budget", "0.02", "--json").stdout)
    calibration = Calibration.load("calibration.safetensors")
    assert (made["digest"], made["linears"], made["unreached"]) == (calibration.digest, 2, [])
    assert 5 in calibration.sites["0"].columns
    options = ("--calibration", ".", "--json")
    compared = json.loads(run("compare", "calibrated_models:tiny", *options).stdout)
    plain = json.loads(run("compare", "calibrated_models:tiny", "--threshold", "0", "--json").stdout)
    assert compared["int8_loss"] < plain["int8_loss"] / 3
    assert [site["path"] for site in compared["sites"]] == ["0", "2"]
    explained = json.loads(run("explain", "calibrated_models:tiny", *options).stdout)
    assert explained["calibrations"] == [f"calibration calibration.safetensors ({calibration.digest[:8]})"]
    exported = json.loads(run("export", "calibrated_models:tiny", "tiny.pt2", *options).stdout)
    assert "calibrated column" in exported["report"]["sites"][0]["detail"]


def test_for_people(folder):
    assert "2 linears" in run("calibrate", "calibrated_models:tiny", "--output", "other.safetensors").stdout
    assert Calibration.load("other.safetensors").sites
    assert "SQNR" in run("compare", "calibrated_models:tiny", "--no-each").stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("calibrate", "calibrated_models:tiny", "--output", "nowhere/a.safetensors"), "there is no folder 'nowhere'"),
        (("calibrate", "calibrated_models:both"), "gives args and kwargs; expected one of them"),
        (("compare", "calibrated_models:tiny", "--calibration", "none.safetensors"), "there is no calibration"),
        (("calibrate", "calibrated_models:nothing"), "has no attribute 'nothing'"),
    ],
)
def test_what_cannot_be_done_is_said_on_stderr(arguments, problem):
    assert problem in run(*arguments, code=1).stderr


def test_a_text_needs_a_tokenizer(folder):
    (folder / "text.txt").write_text("some words")
    assert "has no tokenizer" in run("calibrate", "calibrated_models:tiny", "--text", "text.txt", code=1).stderr
