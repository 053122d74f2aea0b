"""A cache folder of a test's own, and a library that is kept in it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_library

from int8compile.native import kernel_cache, libraries, loader


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty cache folder, and a library named tiny."""
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    with tiny_library.defined(tmp_path / "sources"):
        yield (tmp_path / "cache").resolve()


@pytest.fixture
def kept(cache, capfd) -> kernel_cache.Place:
    """Where the library is, which is there."""
    loader.build("tiny")
    capfd.readouterr()
    return libraries.inspect("tiny")[0]
