"""What the documents show is true: code blocks run, commands parse, files exist, and nothing is left out."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import typer
from checkout import ROOT
from documents import DOCUMENTS, Block, blocks, commands, first_column, inline_code

import int8compile
from int8compile import errors
from int8compile.cli.commands import app
from int8compile.config import Int8Config
from int8compile.passes import PIPELINE
from int8compile.report import Reason

NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]
WITH_PYTHON = [name for name in NAMES if any(block.language == "python" for block in blocks(ROOT / name))]
WITH_SLOW = [name for name in NAMES if any(block.slow for block in blocks(ROOT / name))]

# At most so many blocks may go unrun, and every one of them says why.
NOT_RUN_AT_MOST = 2


def run_blocks(document: Path, wanted: Callable[[Block], bool]) -> None:
    """Execute a document's Python blocks in one namespace; a failure is reported with the document's own lines."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(document):
        if block.language != "python":
            continue
        code = compile("\n" * (block.line - 1) + block.text, str(document), "exec")
        if not block.not_run and (block.hidden or wanted(block)):
            exec(code, namespace)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Blocks write files: into a folder of their own. Gradients are switched on again behind them."""
    monkeypatch.chdir(tmp_path)
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        yield


@pytest.fixture
def without_inductor(monkeypatch):
    """What the backend hands over runs as it is: inductor takes ten seconds a model, and has its own tests."""
    monkeypatch.setattr("int8compile.handoff.compile_graph", lambda gm, *rest: gm.forward)


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_blocks_run(name, elsewhere, without_inductor):
    run_blocks(ROOT / name, lambda block: not block.slow)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_SLOW)
def test_slow_python_blocks_run(name, elsewhere):
    run_blocks(ROOT / name, lambda block: True)


def test_the_quickstart_runs_through_inductor(capsys):
    namespace: dict[str, Any] = {"__name__": "__main__"}
    source = ROOT / "examples/quickstart.py"
    exec(compile(source.read_text(), str(source), "exec"), namespace)
    assert "2 of 2 linears" in capsys.readouterr().out
    assert source.read_text() in (ROOT / "docs/quickstart.md").read_text()


def test_blocks_that_do_not_run_say_why_and_are_few():
    left = [block for document in DOCUMENTS for block in blocks(document) if block.not_run]
    assert len(left) <= NOT_RUN_AT_MOST, [block.not_run for block in left]
    known = {"", "python", "sh", "cpp", "text"}
    assert {block.language for document in DOCUMENTS for block in blocks(document)} <= known


# Commands of other programs, which are not ours to check.
FOREIGN = {"pip", "cmake", "git", "cd", "pytest", "tlparse", "build/cpp/run_package", "docker"}


def check_options(main: Callable[..., Any] | typer.Typer, name: str, arguments: list[str]) -> None:
    """Parse a command's arguments as the command does, without running it."""
    if not isinstance(main, typer.Typer):
        only = typer.Typer()
        only.command()(main)
        main = only
    command: Any = typer.main.get_command(main)
    if isinstance(command, click.Group) or hasattr(command, "commands"):
        name, *arguments = arguments
        command = command.commands[name]
    with command.make_context(name, arguments):
        pass


def check_module(words: list[str]) -> None:
    """``python -m MODULE ...`` and ``python FILE ...``: it is there, and takes these options."""
    if words[0] != "-m":
        path = ROOT / words[0]
        assert path.is_file(), path
        options = [word for word in words[1:] if word.startswith("--")]
        assert all(f'"{option}"' in path.read_text() for option in options), options
        return
    module, arguments = words[1], words[2:]
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    if spec.submodule_search_locations is not None:
        module += ".__main__"
        assert importlib.util.find_spec(module) is not None, module
    if arguments and module.split(".")[0] in ("benchmarks", "examples"):
        check_options(importlib.import_module(module).main, module, arguments)


def check_command(command: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z0-9_]+=.*", words[0]):
        words.pop(0)
    if not words:
        return
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif words[0] == "int8compile":
        if words[1:] and "--help" not in words:
            check_options(app, "int8compile", words[1:])
    elif words[0] == "python":
        check_module(words[1:])
    elif words[0] == "torchrun":
        check_module(words[words.index("-m") :])
    elif words[0].startswith(".ci/"):
        assert (ROOT / words[0]).is_file()
    else:
        assert words[0] in FOREIGN, f"{words[0]}: an unknown program"
    extras = re.findall(r"(?:int8compile|\.)\[([\w,-]+)\]", command)
    for extra in (extra for found in extras for extra in found.split(",")):
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), flags=re.M), extra


@pytest.mark.parametrize("name", [name for name in NAMES if commands(ROOT / name)])
def test_commands_exist_and_take_their_arguments(name):
    for command in commands(ROOT / name):
        try:
            check_command(command)
        except Exception as error:
            raise AssertionError(f"{name}: {command}: {error}") from error


FOLDERS = ("benchmarks", "csrc", "docs", "examples", "int8compile", "passes", "tests", ".ci")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    for code in inline_code(ROOT / name):
        path = re.fullmatch(rf"({'|'.join(map(re.escape, FOLDERS))})/[\w./*-]*", code)
        if path and "NAME" not in code:
            assert list(ROOT.glob(code.rstrip("/"))), f"{name} names {code}"


@pytest.mark.parametrize("name", NAMES)
def test_links_between_documents_lead_somewhere(name):
    document = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if not target.startswith(("http", "#")):
            assert (document.parent / target.split("#")[0]).exists(), f"{name} links to {target}"


def test_troubleshooting_has_a_way_out_of_every_error_and_reason():
    classes = [value for value in vars(errors).values() if inspect.isclass(value)]
    own = {error.__name__ for error in classes if issubclass(error, errors.Int8CompileError)} - {"Int8CompileError"}
    expected = own | {reason.name for reason in Reason}
    assert first_column(ROOT / "docs/troubleshooting.md") == expected


def test_every_option_and_variable_is_documented():
    options = {field.name for field in dataclasses.fields(Int8Config)}
    variables = set(re.findall(r'"(INT8COMPILE_[A-Z_]+)"', (ROOT / "int8compile/config.py").read_text()))
    assert first_column(ROOT / "docs/options.md") == options | variables


def test_every_public_name_and_command_is_documented():
    reference = (ROOT / "docs/reference.md").read_text()
    for name in int8compile.__all__:
        assert f"::: int8compile.{name}\n" in reference, name
    text = "".join(document.read_text() for document in DOCUMENTS)
    for command in app.registered_commands:
        assert f"int8compile {command.callback.__name__}" in text


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation


def test_documents_say_nothing_about_one_machine():
    for document in DOCUMENTS:
        assert not re.search(r"/(?:home|work|root|Users)/", document.read_text()), document


@pytest.fixture(autouse=True)
def working_folder():
    before = os.getcwd()
    yield
    assert os.getcwd() == before


def test_the_picture_is_that_of_the_results():
    overview = importlib.import_module("benchmarks.overview")
    drawn = overview.picture(json.loads(overview.RESULTS.read_text()))
    assert overview.PICTURE.read_text() == drawn, "python -m benchmarks.overview draws it anew"


def test_every_pass_is_documented():
    names = [rewrite.__name__ for rewrite in PIPELINE]
    for page in ("docs/architecture.md", "docs/options.md"):
        text = (ROOT / page).read_text()
        at = [text.index(f"`{name}`", text.index("`expand`")) for name in names]
        assert at == sorted(at), f"{page} names the passes in another order"


def test_recipes_name_what_the_files_hold():
    recipes = " ".join((ROOT / "docs/contributing.md").read_text().split())
    for path, name in {
        "passes/analysis/linears.py": "match_linear",
        "passes/__init__.py": "PIPELINE",
        "int8compile/config.py": "PASS_NAMES",
        "int8compile/ops/_library.py": "define",
        "csrc/cpu/kernels.h": "Kernels",
        "int8compile/report.py": "Reason",
        "tests/helpers/model_zoo.py": "ZOO",
    }.items():
        assert f"`{path}`" in recipes
        assert f"`{name}`" in recipes
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path} has no {name}"
