"""Building native code: once, whoever starts together; never half; and what is missing is named."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path

import pytest
import torch

from int8compile.errors import KernelBuildError
from int8compile.native import loader, notices, providers

LOAD = "from int8compile.native import loader, providers; loader.load('common')"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder for this test and its subprocesses."""
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(code: str = LOAD) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd="/")


def built(cache: Path) -> list[Path]:
    return list(cache.glob("*/int8compile_common.so"))


def test_processes_build_once_whatever_one_that_was_killed_left_behind(cache):
    process = start()
    deadline = time.monotonic() + 120
    while not list(cache.glob("building-*/*.ninja")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not built(cache)
    assert list(cache.glob("building-*"))
    # Several that start together.
    processes = [start() for _ in range(2)]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    assert sum("compiling the common library" in message for message in messages) == 1
    (library,) = built(cache)
    assert not list(cache.glob("building-*"))
    assert cache.stat().st_mode & 0o077 == 0
    assert library.parent.stat().st_mode & 0o077 == 0
    # Warm: found, not built.
    before = library.stat().st_mtime_ns
    again = start()
    assert "compiling" not in again.communicate()[1]
    assert again.returncode == 0
    assert library.stat().st_mtime_ns == before


def test_no_compiler_is_named_and_falls_back_once(cache, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(loader, "load", lambda name: loader.build(name))
    notices.warn_once.cache_clear()
    with pytest.raises(KernelBuildError, match=r"cannot be built: no C\+\+ compiler \(no-such-compiler\) was found"):
        providers.choose_provider("native", [torch.ones(1)])
    for _ in range(2):
        assert providers.choose_provider("auto", [torch.ones(1)]) == providers.Provider("reference (cpu)", native=False)
    (record,) = [r for r in caplog.records if r.name == "int8compile.native"]
    assert "no C++ compiler (no-such-compiler) was found; the slower reference operators" in record.message
    assert providers.choose_provider("reference", [torch.ones(1)]).native is False


def test_compiler_errors_come_with_their_lines(cache, monkeypatch, tmp_path):
    shutil.copytree(Path(str(resources.files("int8compile.csrc"))), tmp_path / "csrc")
    (tmp_path / "csrc" / "common" / "stamps.cpp").unlink()  # which would only take its time
    (tmp_path / "csrc" / "common" / "release_storage.cpp").write_text("#error this cannot work\n")
    monkeypatch.setattr(resources, "files", lambda package: tmp_path / "csrc")
    with pytest.raises(KernelBuildError, match=r"do not compile(.|\n)*release_storage\.cpp(.|\n)*this cannot work"):
        loader.build("common")
    assert not built(cache)
    assert not list(cache.glob("building-*"))


def test_rejected_kernels_are_warned_about_once(monkeypatch, caplog):
    loader.load("cpu")
    notices.warn_once.cache_clear()
    loader._warn_of_rejected()
    assert not caplog.records
    monkeypatch.setattr(torch.ops.int8compile_native, "rejected", lambda: "amx avx512vnni")
    for _ in range(2):
        loader._warn_of_rejected()
    (record,) = [r for r in caplog.records if r.name == "int8compile.native"]
    assert "kernels for amx, avx512vnni compute wrong numbers on this machine" in record.message


def test_devices_without_native_kernels():
    meta = [torch.empty(1, device="meta")]
    assert providers.choose_provider("auto", meta).name == "reference (meta)"
    with pytest.raises(KernelBuildError, match="no native kernels for meta; use kernels='auto'"):
        providers.choose_provider("native", meta)
