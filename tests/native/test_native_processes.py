"""Processes that build a library at the same time, are killed at it, or find no locks."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_library
from tiny_library import copying, fork, in_child

from int8compile.native import kernel_cache, libraries, loader, trust


def test_a_process_that_is_killed_leaves_nothing_or_all(kept, monkeypatch):
    """At every line that it runs, while it puts a library into the place of one that is damaged."""
    whole, half = kept.binary.read_bytes(), kept.binary.read_bytes()[:100]
    monkeypatch.setattr(libraries, "compile_library", copying(kept.binary))
    traced = {function.__code__ for function in (kernel_cache.keep, kernel_cache._remove)}
    lines: list[tuple[str, int]] = []

    def build(at_line: Callable[[tuple[str, int]], object]) -> None:
        def trace(frame, event, argument):
            if event == "line" and frame.f_code in traced:
                at_line((frame.f_code.co_name, frame.f_lineno))
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            loader.build("tiny")
        finally:
            sys.settrace(before)

    kept.binary.write_bytes(half)
    build(lines.append)
    assert len(lines) > 15
    for line in lines:
        kept.binary.write_bytes(half)
        killed = in_child(lambda here=line: build(lambda at: at == here and os.kill(os.getpid(), signal.SIGKILL)))
        assert killed == -signal.SIGKILL
        there = {path.name: path.read_bytes() for path in kept.folder.glob(f"{kept.key}/*")}
        if kernel_cache.state(kept).ready:
            assert there[kept.binary.name] == whole, line
        else:
            assert there.get(kept.binary.name, half) == half, line  # nothing new without its checksum
            assert list(kept.folder.glob("building-*"))
            loader.build("tiny")
            assert kernel_cache.state(kept).ready
            assert not list(kept.folder.glob("building-*"))


def test_eight_processes_that_start_together_build_once(cache, capfd):
    reading, writing = os.pipe()

    def build() -> None:
        os.close(writing)
        os.read(reading, 1)  # until all are there
        loader.build("tiny")
        assert tiny_library.works(loader.binary_path("tiny"))

    children = [fork(build) for _ in range(8)]
    os.close(reading)
    os.close(writing)
    codes = [os.waitpid(child, 0)[1] for child in children]
    messages = capfd.readouterr().err
    assert codes == [0] * 8, messages
    assert messages.count("compiling") == 1
    assert not list(cache.glob("building-*"))


def test_without_locks_processes_do_not_disturb_each_other(kept, monkeypatch):
    """As on a network file system that has none; what another one is building is left alone."""

    @contextlib.contextmanager
    def unlocked(path: Path) -> Iterator[bool]:
        yield False

    monkeypatch.setattr(kernel_cache, "locked", unlocked)
    theirs = kept.folder / f"building-{kept.key}-theirs"
    theirs.mkdir()
    os.truncate(kept.binary, 100)
    loader.build("tiny")
    assert theirs.exists()
    assert tiny_library.works(kept.binary)
    # One that was faster: its library is as good.
    rename = Path.rename

    def late(path: Path, target: Path) -> Path:
        if target == kept.binary.parent:
            shutil.copytree(path, target)
        return rename(path, target)

    os.truncate(kept.binary, 100)
    monkeypatch.setattr(Path, "rename", late)
    assert loader.build("tiny") == kept.binary
    assert kernel_cache.state(kept).ready


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock")])
def test_where_there_are_no_locks_it_is_said(tmp_path, monkeypatch, error):
    with kernel_cache.locked(tmp_path / "lock") as held:
        assert held

    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(kernel_cache.filelock.FileLock, "_acquire", fail)
    with kernel_cache.locked(tmp_path / "lock") as held:
        assert not held


def test_nobody_else_can_hold_a_lock(kept):
    (lock,) = kept.folder.glob("*.lock")
    assert lock.stat().st_mode & 0o077 == 0
    assert trust.current_user() is None or lock.stat().st_uid == os.geteuid()
