"""Lets a lower part of the package call a higher one without importing it.

``int8compile/__init__.py`` registers a loader for the higher part, which imports it at the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_loaders: dict[str, Callable[[], Any]] = {}


def register(name: str, load: Callable[[], Any]) -> None:
    """Register a loader: a function that imports a part and returns it."""
    _loaders[name] = load


def calibration() -> Any:
    """``int8compile.calibration``, for configurations, which name one."""
    return _loaders["calibration"]()


def transformers_integration() -> Any:
    """``int8compile.integrations.transformers``, which registers the quantisation method ``"int8compile"``.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    return _loaders["transformers"]()
