"""Libraries that are kept: whole or not at all, found only as they were built, and no one else's."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_library
import torch
from tiny_library import ANOTHER, warnings

from int8compile.errors import KernelBuildError
from int8compile.native import kernel_cache, libraries, loader, providers


def test_a_library_is_kept_with_its_checksum_and_found(kept, monkeypatch, caplog):
    digest = hashlib.sha256(kept.binary.read_bytes()).hexdigest()
    assert kept.checksum.read_text() == f"{digest}  int8compile_tiny.so\n"  # as sha256sum -c has it
    monkeypatch.setattr(libraries, "compile_library", lambda *args: pytest.fail("was built again"))
    assert loader.build("tiny") == kept.binary == loader.binary_path("tiny")
    assert tiny_library.works(kept.binary)
    assert not warnings(caplog)


@pytest.mark.parametrize(("given", "expected"), [(0o755, 0o755), (0o700, 0o700), (0o750, 0o750)])
def test_who_may_read_the_cache_folder_may_read_what_is_in_it_and_nobody_write(cache, given, expected):
    """Even with a umask that forbids nothing, or everything."""
    for umask in (0o000, 0o077):
        before = os.umask(umask)
        try:
            cache.mkdir()
            cache.chmod(given)
            library = loader.build("tiny")
        finally:
            os.umask(before)
        modes = [path.stat().st_mode & 0o777 for path in (library.parent, library, Path(f"{library}.sha256"))]
        assert modes == [expected, expected, expected & 0o644]
        shutil.rmtree(cache)


def test_folders_on_the_way_are_made_for_this_user_alone(cache, monkeypatch):
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(cache / "a" / "b"))
    before = os.umask(0)
    try:
        loader.build("tiny")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (cache, cache / "a", cache / "a" / "b")] == [0o700] * 3


def _a_link(path: Path, to: Path) -> None:
    """As a file that is whole, but somewhere else."""
    shutil.copy(path, to)
    path.unlink()
    path.symlink_to(to)


def _a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _a_folder(path: Path) -> None:
    path.unlink()
    (path / "something").mkdir(parents=True)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[kernel_cache.Place], object], str]] = {
    "truncated": (lambda p: os.truncate(p.binary, 4096), "does not match its checksum"),
    "empty": (lambda p: os.truncate(p.binary, 0), "does not match its checksum"),
    "garbage": (lambda p: p.binary.write_bytes(os.urandom(20000)), "does not match its checksum"),
    "one bit": (lambda p: _flip(p.binary), "does not match its checksum"),
    "another library": (lambda p: shutil.copy(torch._C.__file__, p.binary), "does not match its checksum"),
    "a link": (lambda p: _a_link(p.binary, p.folder / "elsewhere"), "cannot be read"),
    "a pipe": (lambda p: _a_pipe(p.binary), "is not a regular file"),
    "a folder": (lambda p: _a_folder(p.binary), "is not a regular file"),
    "others may write": (lambda p: p.binary.chmod(0o777), "every user may write to"),
    "no checksum": (lambda p: p.checksum.unlink(), "has no checksum"),
    "empty checksum": (lambda p: os.truncate(p.checksum, 0), "does not match its checksum"),
    "half a checksum": (lambda p: os.truncate(p.checksum, 32), "does not match its checksum"),
    "wrong checksum": (lambda p: p.checksum.write_text("0" * 64), "does not match its checksum"),
    "checksum is a pipe": (lambda p: _a_pipe(p.checksum), "is not a regular file"),
    "checksum is a folder": (lambda p: _a_folder(p.checksum), "is not a regular file"),
    "others may write the checksum": (lambda p: p.checksum.chmod(0o666), "every user may write to"),
    "others may write the folder": (lambda p: p.binary.parent.chmod(0o777), "every user may write to"),
    "the folder is a file": (lambda p: (shutil.rmtree(p.binary.parent), p.binary.parent.touch()), "not a folder"),
    "the folder is a link": (
        lambda p: p.binary.parent.symlink_to(p.binary.parent.rename(p.folder / "elsewhere")),
        "is not a folder",
    ),
}
if os.geteuid() == 0:
    DAMAGE |= {
        "another's": (lambda p: os.chown(p.binary, ANOTHER, -1), f"belongs to user {ANOTHER}"),
        "another's checksum": (lambda p: os.chown(p.checksum, ANOTHER, -1), f"belongs to user {ANOTHER}"),
        "another's folder": (lambda p: os.chown(p.binary.parent, ANOTHER, -1), f"belongs to user {ANOTHER}"),
    }
else:
    DAMAGE["unreadable"] = (lambda p: p.binary.chmod(0), "cannot be read (Permission denied)")


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_not_as_it_was_built_is_built_anew_once(kept, kind, caplog, capfd, monkeypatch):
    """In its place, since the cache folder is this user's; with one warning, and not from whatever was planted."""
    damage, expected = DAMAGE[kind]
    damage(kept)
    loader.load("tiny")
    (message,) = warnings(caplog)
    assert expected in message
    assert str(kept.binary.parent) in message
    assert message.endswith("; it has been built anew")
    assert capfd.readouterr().err.count("compiling") == 1
    # All is well from then on.
    monkeypatch.setattr(libraries, "compile_library", lambda *args: pytest.fail("was built again"))
    assert loader.build("tiny") == kept.binary
    assert tiny_library.works(kept.binary)
    assert warnings(caplog) == [message]
    assert not list(kept.folder.glob("building-*"))


def test_a_library_that_does_not_load_is_built_anew_once(kept, caplog, capfd):
    """Although its checksum is right, as on a system with other libraries."""
    kept.binary.write_bytes(b"not a library")
    kept.checksum.write_text(hashlib.sha256(b"not a library").hexdigest())
    loader.load("tiny")
    (message,) = warnings(caplog)
    assert f"{kept.binary} does not load (" in message
    assert message.endswith("; it has been built anew")
    assert capfd.readouterr().err.count("compiling") == 1
    assert tiny_library.works(kept.binary)


def test_a_library_that_never_loads_is_an_error_and_built_once_a_process(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    with tiny_library.defined(tmp_path, 'extern "C" int nowhere(); int call() { return nowhere(); }\n'):
        loader.build("tiny")  # linked, as by another system, and now at hand
        capfd.readouterr()
        load = loader.load
        monkeypatch.setattr(loader, "load", lambda name: load("tiny"))
        for _ in range(2):
            with pytest.raises(KernelBuildError, match=r"tiny kernels do not load, although .*: .*nowhere"):
                providers.choose_provider("native", [torch.ones(1)])
            assert not providers.choose_provider("auto", [torch.ones(1)]).native
        (message,) = warnings(caplog)
        assert "the tiny kernels do not load" in message
        assert capfd.readouterr().err.count("compiling") == 1


def test_a_damaged_library_is_named_where_none_can_be_built(kept, monkeypatch):
    os.truncate(kept.binary, 100)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(KernelBuildError, match=r"\(no-such-compiler\) was found \(.*tiny\.so is damaged"):
        loader.load("tiny")
