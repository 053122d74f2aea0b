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

from int8compile import hooks

if TYPE_CHECKING:
    from int8compile.backend import int8
    from int8compile.calibrating.calibrate import calibrate
    from int8compile.calibrating.compare import compare
    from int8compile.calibration import Calibration
    from int8compile.config import Int8Config
    from int8compile.explanation import explain
    from int8compile.graph.dump import dump
    from int8compile.modules.inplace import dequantize_, quantize_
    from int8compile.modules.int8_experts import Int8Experts
    from int8compile.modules.int8_linear import Int8Linear, Int8MasterLinear
    from int8compile.programs.archive import load, save
    from int8compile.programs.exporting import export
    from int8compile.programs.packaging import load_package, package
    from int8compile.report import Reason, Report, Site
    from int8compile.session import last_report
    from int8compile.tuning.tune import tune
    from int8compile.weights.invalidation import invalidate, restore_weights_

__version__ = "0.1.0"

# passes/ and csrc/ stand beside this folder in a checkout and inside it once installed. Python finds this folder first
# when it is started in a checkout, so let it find those two there as well.
_checkout = Path(__file__).resolve().parent.parent
if not (_checkout / "int8compile" / "passes").exists() and (_checkout / "pyproject.toml").exists():
    __path__.append(str(_checkout))

_HOME = {
    "Calibration": "calibration",
    "Int8Config": "config",
    "Int8Experts": "modules.int8_experts",
    "Int8Linear": "modules.int8_linear",
    "Int8MasterLinear": "modules.int8_linear",
    "Reason": "report",
    "Report": "report",
    "Site": "report",
    "calibrate": "calibrating.calibrate",
    "compare": "calibrating.compare",
    "dequantize_": "modules.inplace",
    "dump": "graph.dump",
    "explain": "explanation",
    "export": "programs.exporting",
    "int8": "backend",
    "invalidate": "weights.invalidation",
    "last_report": "session",
    "load": "programs.archive",
    "load_package": "programs.packaging",
    "package": "programs.packaging",
    "quantize_": "modules.inplace",
    "restore_weights_": "weights.invalidation",
    "save": "programs.archive",
    "tune": "tuning.tune",
}

__all__ = [
    "Calibration",
    "Int8Config",
    "Int8Experts",
    "Int8Linear",
    "Int8MasterLinear",
    "Reason",
    "Report",
    "Site",
    "calibrate",
    "compare",
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
    "tune",
]

hooks.register("calibration", lambda: importlib.import_module("int8compile.calibration"))
hooks.register("transformers", lambda: importlib.import_module("int8compile.integrations.transformers"))


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'int8compile' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"int8compile.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
