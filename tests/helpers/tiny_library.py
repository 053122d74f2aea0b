"""A library that compiles in a second, in the place of the kernels: for tests of how libraries are built and kept.

In processes of their own, ``from tiny_library import define; define(folder)`` comes before anything that builds.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from int8compile.native import builder, kernel_cache, loader, notices

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
ANOTHER = 42345  # a user id that nobody has

SOURCE = 'extern "C" int int8compile_tiny() { return 42; }\n'


def define(folder: Path, source: str = SOURCE) -> None:
    """A library ``tiny``, whose source is in ``folder``, beside those there are."""
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "tiny" / "tiny.cpp").write_text(source)
    builder.LIBRARIES["tiny"] = builder.Library((str(folder / "tiny"),), ("-O0",))


@contextlib.contextmanager
def defined(folder: Path, source: str = SOURCE) -> Iterator[None]:
    """As ``define``, for as long as the context lasts."""
    define(folder, source)
    notices.warn_once.cache_clear()
    try:
        yield
    finally:
        del builder.LIBRARIES["tiny"]
        loader._loaded.discard("tiny")
        loader._hopeless.pop("tiny", None)
        kernel_cache._remove_temporary(os.getpid())


def works(library: Path) -> bool:
    """Whether the file is the library, by running a copy: what is loaded from one path stays what it was at first."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        copy = shutil.copy(library, Path(folder) / "copy.so")
        return ctypes.CDLL(str(copy)).int8compile_tiny() == 42


def copying(library: Path) -> Callable[[str, Path], Path]:
    """A compiler that is quick, and runs for every user, wherever Python's headers are."""
    data = library.read_bytes()

    def compile_library(name: str, folder: Path) -> Path:
        (folder / "built").write_bytes(data)
        return folder / "built"

    return compile_library


def warnings(caplog: Any) -> list[str]:
    """What users are warned of."""
    return [record.message for record in caplog.records if record.name == "int8compile.native"]


def fork(call: Callable[[], object], user: int | None = None) -> int:
    """Run in a process of its own, which has all that this one has imported, as another user if asked; its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if user is not None:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def in_child(call: Callable[[], object], user: int | None = None) -> int:
    """The exit code of such a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(call, user), 0)[1])
