"""int8compile: LLM.int8() as a torch.compile backend.

    model = torch.compile(model, backend="int8")

needs no import of this package. What is here serves to quantise in place (``quantize_``), to look (``explain``,
``last_report``), to configure (``Int8Config``) and to tell it what it cannot see (``invalidate``). Names load when
first used.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from int8compile.archive import load, save
    from int8compile.backend import int8
    from int8compile.config import Int8Config
    from int8compile.explanation import explain
    from int8compile.exporting import export
    from int8compile.graph_text import dump
    from int8compile.inplace import dequantize_, quantize_
    from int8compile.lifetime import invalidate, restore_weights_
    from int8compile.modules import Int8Linear, Int8MasterLinear
    from int8compile.packaging import load_package, package
    from int8compile.report import Reason, Report, Site
    from int8compile.session import last_report

__version__ = "0.1.0"

# passes/ and csrc/ stand beside this folder in a checkout and inside it once installed. Python finds this folder first
# when it is started in a checkout, so let it find those two there as well.
_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "int8compile" / "passes").exists() and (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))

_HOME = {
    "Int8Config": "config",
    "Int8Linear": "modules",
    "Int8MasterLinear": "modules",
    "Reason": "report",
    "Report": "report",
    "Site": "report",
    "dequantize_": "inplace",
    "dump": "graph_text",
    "explain": "explanation",
    "export": "exporting",
    "int8": "backend",
    "invalidate": "lifetime",
    "last_report": "session",
    "load": "archive",
    "load_package": "packaging",
    "package": "packaging",
    "quantize_": "inplace",
    "restore_weights_": "lifetime",
    "save": "archive",
}

__all__ = [
    "Int8Config",
    "Int8Linear",
    "Int8MasterLinear",
    "Reason",
    "Report",
    "Site",
    "dequantize_",
    "dump",
    "explain",
    "export",
    "int8",
    "invalidate",
    "last_report",
    "load",
    "load_package",
    "package",
    "quantize_",
    "restore_weights_",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'int8compile' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"int8compile.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
