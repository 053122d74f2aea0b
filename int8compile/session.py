"""The Report of the model that this process compiled last."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from int8compile.report import GraphReport, Report

_lock = threading.Lock()
_latest: Report | None = None
_owner: Callable[[], Any] | None = None


def record(graph: GraphReport, owner: Callable[[], Any] | None) -> None:
    """Add a compiled graph to the latest report, or begin a new one if it belongs to another model.

    Args:
        owner: weak reference to what was handed to ``torch.compile``; None if unknown, which is never the same.
    """
    global _latest, _owner
    with _lock:
        same = owner is not None and _owner is not None and owner() is _owner() is not None
        if _latest is None or not same:
            _latest, _owner = Report(), owner
        _latest.add(graph)


def last_report() -> Report | None:
    """The Report of the model compiled last with ``backend="int8"``, all its graphs so far; None before the first."""
    with _lock:
        return _latest
