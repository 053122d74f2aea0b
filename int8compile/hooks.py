"""Parts of the package that parts below them call, without importing what is above them.

``int8compile/__init__.py`` says how such a part is loaded, which happens when it is first called for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loaders: dict[str, Callable[[], Any]] = {}


def register(name: str, load: Callable[[], Any]) -> None:
    """Say how a part is loaded."""
    _loaders[name] = load


def transformers_integration() -> Any:
    """``int8compile.integrations.transformers``, which registers the quantisation method ``"int8compile"``.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    return _loaders["transformers"]()
