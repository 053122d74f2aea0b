"""A library that compiles in a second, in the place of the kernels: for tests of how libraries are built and kept.

In processes of their own, ``from tiny_library import define; define(folder)`` comes before anything that builds.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

from int8compile import native, native_cache

SOURCE = 'extern "C" int int8compile_tiny() { return 42; }\n'


def define(folder: Path, source: str = SOURCE) -> None:
    """A library ``tiny``, whose source is in ``folder``, beside those there are."""
    (folder / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "tiny" / "tiny.cpp").write_text(source)
    native.LIBRARIES["tiny"] = native.Library((str(folder / "tiny"),), ("-O0",))


@contextlib.contextmanager
def defined(folder: Path, source: str = SOURCE) -> Iterator[None]:
    """As ``define``, for as long as the context lasts."""
    define(folder, source)
    native._warn_once.cache_clear()
    try:
        yield
    finally:
        del native.LIBRARIES["tiny"]
        native._loaded.discard("tiny")
        native._hopeless.pop("tiny", None)
        native_cache._remove_temporary(os.getpid())


def works(library: Path) -> bool:
    """Whether the file is the library, by running it."""
    return ctypes.CDLL(str(library)).int8compile_tiny() == 42

