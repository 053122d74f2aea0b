"""What ``int8compile doctor`` says of where libraries are kept; it builds nothing and makes no folder."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_library
from typer.testing import CliRunner

from int8compile.cli import app
from int8compile.errors import KernelBuildError
from int8compile.native import doctor, kernel_cache, libraries, loader

runner = CliRunner()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that is not there yet, and no compiler that could be called."""
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "compile_library", lambda *args: pytest.fail("was built"))
    return (tmp_path / "cache").resolve()


def run_doctor() -> tuple[dict[str, Any], str]:
    """Its JSON; and its text, with what is on stderr, in one line."""
    as_json, as_text = runner.invoke(app, ["doctor", "--json"]), runner.invoke(app, ["doctor"])
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == as_text.exit_code == (1 if found["problems"] else 0), as_text.output
    return found, " ".join((as_text.stdout + as_text.stderr).split())


def test_an_empty_cache_folder_is_no_problem(cache):
    found, text = run_doctor()
    assert found["cache_folder"] == {"path": str(cache), "writable": True, "problem": None, "temporary": None}
    assert found["libraries"]["cpu"] == {"path": str(loader.binary_path("cpu")), "built": False, "problem": None}
    assert found["problems"] == []
    assert "not built yet (int8compile build)" in text
    assert not cache.exists()


def test_a_cache_folder_that_is_refused(cache):
    cache.mkdir()
    cache.chmod(0o777)
    found, text = run_doctor()
    (problem,) = found["problems"]
    assert problem == found["cache_folder"]["problem"]
    assert f"is not used: every user may write to {cache} (mode 0777) (chmod go-w {cache})" in problem
    assert f"problem: the cache folder {cache} is not used" in text
    assert found["libraries"]["cpu"]["built"] is False
    assert found["kernels"]["chosen"] is None


def test_nothing_is_built_for_keeps_where_it_cannot_be_kept(cache):
    cache.touch()
    done = runner.invoke(app, ["build", "--json"])
    assert (done.exit_code, done.stdout) == (1, "")
    assert (
        f"the cpu kernels cannot be kept: the cache folder {cache} is not used: {cache} is not a folder" in done.stderr
    )


def test_no_home(monkeypatch):
    for name in ("INT8COMPILE_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    found, text = run_doctor()
    assert found["cache_folder"]["path"] is None
    assert found["problems"] == ["there is no home folder for a cache: HOME is '' (set INT8COMPILE_CACHE_DIR)"]
    assert "builds in a temporary folder of each process" in text


def test_a_cache_folder_that_cannot_be_written_to(cache, monkeypatch):
    """Is none where all is built."""
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK))
    found, _ = run_doctor()
    assert found["problems"] == [f"the cache folder {cache} cannot be written to: set INT8COMPILE_CACHE_DIR to another"]
    ready = kernel_cache.State(ready=True)
    monkeypatch.setattr(libraries, "inspect", lambda name: (kernel_cache.Place(cache, name, "library.so"), ready))
    monkeypatch.setattr(doctor, "_kernels", lambda *args: {"chosen": None})
    found, text = run_doctor()
    assert found["cache_folder"]["writable"] is False
    assert found["problems"] == []
    assert "(its checksum matches)" in text


def test_a_damaged_library_is_named_and_left_as_it_is(cache):
    library = loader.binary_path("cpu")
    library.parent.mkdir(parents=True, mode=0o700)
    library.write_bytes(b"damaged")
    library.with_name(f"{library.name}.sha256").write_text("0" * 64)
    found, text = run_doctor()
    problem = f"{library} is damaged (it does not match its checksum)"
    assert found["libraries"]["cpu"] == {"path": str(library), "built": False, "problem": problem}
    assert "is damaged" in text
    assert library.read_bytes() == b"damaged"


def test_a_library_that_does_not_load_is_not_built_anew(tmp_path, monkeypatch):
    with tiny_library.defined(tmp_path / "sources"):
        place, _ = libraries.inspect("tiny")
        place.folder.mkdir(mode=0o700)
        (place.folder / "built").write_bytes(b"not a library")
        scratch = place.folder / "scratch"
        scratch.mkdir()
        kernel_cache.keep(place, shutil.move(place.folder / "built", scratch / "built"))
        with pytest.raises(KernelBuildError, match=r"the tiny kernels do not load: .*tiny\.so: "):
            loader.load("tiny", build=False)
        assert place.binary.read_bytes() == b"not a library"
        place.binary.unlink()
        with pytest.raises(KernelBuildError, match="do not load: they are not built yet"):
            loader.load("tiny", build=False)


def test_the_temporary_folder_in_use(cache):
    cache.touch()
    try:
        folder = kernel_cache.temporary_folder()
        found, text = run_doctor()
        assert found["cache_folder"]["temporary"] == str(folder)
        assert f"a temporary folder takes its place: {folder}" in text
    finally:
        kernel_cache._remove_temporary(os.getpid())
