"""Compiling a library: which compiler, however CXX is written, and that nothing else changes."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_library
import torch

from int8compile.errors import KernelBuildError
from int8compile.native import builder

COMPILER = shutil.which("c++")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder to build in, for a library named tiny."""
    monkeypatch.setenv("TORCH_NO_COMPILER_WRAPPER", "1")  # ccache would only be another way to the same compiler
    (tmp_path / "build").mkdir()
    with tiny_library.defined(tmp_path / "sources"):
        yield tmp_path / "build"


@pytest.fixture
def wrapper(tmp_path) -> Path:
    """A compiler in a folder with a space, which leaves a word behind when it is called with the source."""
    path = tmp_path / "my tools" / "my c++"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path}/called"\nexec {COMPILER} "$@"\n')
    path.chmod(0o755)
    return path


def build(folder: Path) -> bool:
    """Whether a library that works comes of it, with the environment as it was."""
    before = dict(os.environ)
    built = builder.compile_library("tiny", folder)
    assert dict(os.environ) == before
    return tiny_library.works(built)


@pytest.mark.parametrize("value", [None, "", " ", "''", "$INT8COMPILE_EMPTY"])
def test_nothing_in_cxx_is_the_same_as_none(folder, monkeypatch, value):
    monkeypatch.setenv("INT8COMPILE_EMPTY", "")
    monkeypatch.delenv("CXX") if value is None and "CXX" in os.environ else None
    if value is not None:
        monkeypatch.setenv("CXX", value)
    assert builder.cxx() == ("c++", COMPILER)
    assert build(folder)


@pytest.mark.parametrize(
    "value", ["'{}'", "{}", "{} -DINT8COMPILE_WORD='two words'", "env INT8COMPILE=1 '{}'", "$TOOL"]
)
def test_what_is_in_cxx_is_run(folder, wrapper, monkeypatch, tmp_path, value):
    """Quoted or not, with flags, after another program, by a variable."""
    monkeypatch.setenv("TOOL", f"'{wrapper}'")
    quoted = f"'{wrapper}'" if value.startswith("{} ") else wrapper
    monkeypatch.setenv("CXX", value.format(quoted))
    name, found = builder.cxx()
    assert name == ("env" if value.startswith("env") else str(wrapper))
    assert found == shutil.which(name)
    assert build(folder)
    called = (tmp_path / "called").read_text()
    assert "tiny.cpp" in called
    assert ("-DINT8COMPILE_WORD=two words" in called) == ("WORD" in value)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("no-such-compiler", "no-such-compiler"),
        ("no-such-compiler -O2", "no-such-compiler"),
        ("/no such/c++", "/no"),
        ("$INT8COMPILE_UNSET/c++", "$INT8COMPILE_UNSET/c++"),
        ("'no end", "'no end"),
        ("/dev/null", "/dev/null"),
    ],
)
def test_a_compiler_that_is_not_there_is_named(folder, monkeypatch, value, named):
    monkeypatch.setenv("CXX", value)
    assert builder.cxx() == (named, None)
    with pytest.raises(KernelBuildError) as caught:
        build(folder)
    assert f"no C++ compiler ({named}) was found" in str(caught.value).splitlines()[0]
    assert not list(folder.iterdir())


def test_missing_ninja_is_named(folder, monkeypatch):
    monkeypatch.setattr(builder, "ninja", lambda: None)
    with pytest.raises(KernelBuildError, match=r"ninja was not found \(pip install ninja\)"):
        build(folder)


def test_ninja_is_found_beside_python_where_it_is_not_on_path(folder, monkeypatch):
    import ninja

    monkeypatch.setenv("PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if p != ninja.BIN_DIR))
    assert Path(builder.ninja()).parent == Path(ninja.BIN_DIR)
    assert build(folder)


def test_the_environment_is_restored_whatever_happens(folder, monkeypatch):
    monkeypatch.setenv("CXX", "c++ -O0")
    monkeypatch.setenv("CC", " ")
    before = dict(os.environ)
    inside = {}

    def interrupted() -> None:
        with builder._tools_in_environment(folder):
            inside.update(os.environ)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside["CXX"] != before["CXX"]
    assert "CC" not in inside  # which nvcc would take for a compiler's name
    assert dict(os.environ) == before
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.delenv("CXX")
    with builder._tools_in_environment(folder):
        assert os.environ["CC"] == "gcc"


@pytest.mark.parametrize("found", [True, False])
def test_the_compiler_does_without_the_users_temporary_folder(folder, monkeypatch, tmp_path, found):
    """It would take $TMPDIR, whatever that is."""
    monkeypatch.setenv("TMPDIR", "/proc")

    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", (lambda: str(tmp_path)) if found else none)
    assert build(folder)
    with builder._tools_in_environment(folder):
        assert os.environ["TMPDIR"] == str(tmp_path if found else folder)


def test_building_loads_nothing(folder):
    """It may turn out that the library cannot be kept; and what registers operators does so once a process."""
    before = set(torch.ops.loaded_libraries)
    builder.compile_library("tiny", folder)
    assert set(torch.ops.loaded_libraries) == before


def test_a_failed_build_does_not_stand_in_the_way_of_the_next(tmp_path):
    """torch gives the second a name of its own."""
    for number, source in enumerate(["#error not yet\n", tiny_library.SOURCE, tiny_library.SOURCE]):
        (tmp_path / str(number)).mkdir()
        with tiny_library.defined(tmp_path / "sources", source):
            if number == 0:
                with pytest.raises(
                    KernelBuildError, match=r"the tiny kernels do not compile with c\+\+\n(.|\n)*not yet"
                ):
                    build(tmp_path / "0")
            else:
                assert build(tmp_path / str(number))


def test_other_flags_and_other_sources_are_another_library(tmp_path, monkeypatch):
    def key(source: str = tiny_library.SOURCE, *flags: str) -> str:
        with tiny_library.defined(tmp_path, source):
            builder.LIBRARIES["tiny"] = builder.LIBRARIES["tiny"]._replace(flags=flags)
            return builder.key("tiny")

    assert key() == key()
    keys = {key(), key("// other\n"), key(tiny_library.SOURCE, "-O3")}
    monkeypatch.setattr(builder, "_LINK_FLAGS", [])
    keys.add(key())
    assert len(keys) == 4
    assert all(name.startswith("tiny-") for name in keys)
