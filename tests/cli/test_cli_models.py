"""``explain``, ``export`` and ``package``: a model named on the command line becomes a program and a package."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
import transformers
import typer
from command_line import run
from model_zoo import llama, tokens
from typer.testing import CliRunner

import int8compile
from int8compile.cli import app
from int8compile.cli.named_models import find
from int8compile.config import cache_folder

runner = CliRunner()
SOURCE = """
import torch
from torch import nn

def tiny():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return model, (torch.ones(2, 8),), {}, ({0: torch.export.Dim.DYNAMIC},)

def wrong():
    return 3

def bare():
    return tiny()[0], torch.ones(2, 8)

def talkative():
    print("making a model")
    return tiny()

def mistaken():
    return torch.no_such_function()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "models_of_mine.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_weights_only(folder):
    for options, want in (
        (["--activation", "float"], ["weights only", "weights only"]),
        (["--weight-only", "2"], ["", "weights only"]),
    ):
        command = ["models_of_mine:tiny", "--min-features", "0", "--json", *options]
        for made in (["explain", *command], ["export", command[0], f"{len(options[1])}.pt2", *command[1:]]):
            report = json.loads(run(*made).stdout)
            report = report.get("report", report)
            assert [site["detail"] for site in report["sites"]] == want, made
    assert "activation='int4'" in run("explain", "models_of_mine:tiny", "--activation", "int4", code=1).stderr


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


@pytest.mark.slow
def test_the_examples_of_help_run(folder):
    """In the order in which a reader meets them, on a model of the name that they use."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=128, num_key_value_heads=4, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained("SmolLM2-135M")
    environment = {**os.environ, "INT8COMPILE_CACHE_DIR": str(cache_folder())}
    for name, command in typer.main.get_command(app).commands.items():
        example = re.search(r"Example: (.*)", command.help)[1]
        # What is built already need not be built again in another folder.
        words = [word for word in example.split() if not word.startswith("INT8COMPILE_CACHE_DIR=")]
        assert words[:2] == ["int8compile", name]
        arguments = [sys.executable, "-m", "int8compile.cli", *words[1:]]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        if "--json" in words:
            json.loads(done.stdout)
    assert (folder / "smollm2.aoti.pt2").exists()


def test_progress_is_on_stderr_and_names_the_steps(folder):
    shown = run("export", "models_of_mine:tiny", "tiny.pt2", "--min-features", "0")
    assert shown.stdout.startswith("tiny.pt2: ")
    quiet = run("export", "models_of_mine:tiny", "tiny.pt2", "--min-features", "0", "--json")
    assert "quantise" not in quiet.stderr
    steps = []
    program = int8compile.export(
        *find("models_of_mine:tiny"), {"min_features": 0}, progress=lambda *step: steps.append(step)
    )
    assert steps == [
        ("trace the model", 0, None),
        ("trace the model", 1, 1),
        ("quantise weights", 1, 2),
        ("quantise weights", 2, 2),
    ]
    assert program.state_dict["0.weight_int8"].dtype is torch.int8


def test_what_cannot_be_written_exits_with_1_before_a_model_is_made(folder):
    result = run("export", "models_of_mine:talkative", "missing/tiny.pt2", code=1)
    assert "there is no folder 'missing'" in result.stderr
    assert "making a model" not in result.output
    assert not any("saving" in name for name in os.listdir(folder))


def test_json_is_alone_on_stdout_whatever_a_model_prints(folder):
    for arguments in (("explain", "models_of_mine:talkative"), ("export", "models_of_mine:talkative", "tiny.pt2")):
        result = run(*arguments, "--json")
        json.loads(result.stdout)
        assert "making a model" in result.stderr


def test_mistakes_within_a_models_function_keep_their_traceback(folder):
    result = runner.invoke(app, ["explain", "models_of_mine:mistaken"])
    assert result.exit_code == 1
    assert isinstance(result.exception, AttributeError)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_leaves_nothing_half_written(folder, number, code):
    """The model's own function stops the process, within what writes the program."""
    stop = f"args[1].write(b'half'), os.kill(os.getpid(), {int(number)})"
    (folder / "stopping.py").write_text(
        "import os, signal, torch\nfrom models_of_mine import tiny\n"
        # A background job of a shell without job control ignores Ctrl-C, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"torch.export.save = lambda *args, **_: ({stop})\n"
    )
    command = [sys.executable, "-m", "int8compile.cli", "export", "stopping:tiny", "tiny.pt2"]
    before = sorted(os.listdir(folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert sorted({*os.listdir(folder)} - {"__pycache__"}) == before


def test_mistakes_exit_with_1_and_their_reason(folder):
    for arguments, reason in (
        (("explain", "models_of_mine:big"), "has no attribute 'big'; expected module:function"),
        (("explain", "nowhere:tiny"), "No module named 'nowhere'"),
        (("export", "models_of_mine:wrong", "x.pt2"), "wrong() returned int; expected (model, args"),
        (("export", "models_of_mine:bare", "x.pt2"), "bare() returned a Tensor as args; expected a tuple"),
        (("explain", "./no_folder"), "'./no_folder': there is no such folder"),
        (("export", "models_of_mine:tiny", "x.pt"), "expected one that ends in '.pt2'"),
        (("package", "nothing.pt2", "x.pt2"), "there is no file 'nothing.pt2'"),
        (("package", "models_of_mine.py", "x.pt2"), "not a file of int8compile.save at all"),
    ):
        result = run(*arguments, code=1)
        assert reason in result.stderr.replace("\n", " "), result.stderr
        assert result.stdout == ""
    run("export", "models_of_mine:tiny", code=2)
