"""The errors that int8compile raises, one class for each kind of mistake.

A message names the argument, its value, what was expected and the way out. Dynamo shows a backend's
errors as ``BackendCompilerFailed: backend='int8' raised:`` followed by the message, so the first line of each
message makes sense by itself.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Int8CompileError(Exception):
    """Base class of every error this package raises on purpose."""


class OptionNameError(Int8CompileError, TypeError):
    """An option that does not exist, with the nearest one that does."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        way_out = " Inductor's own go into options={'inductor': {...}}." if "inductor" in known else ""
        super().__init__(f"unknown option {name!r}.{hint} Known options: {', '.join(known)}.{way_out}")


class OptionValueError(Int8CompileError, ValueError):
    """An option whose value has the wrong type or lies outside its range."""

    def __init__(self, name: str, value: object, expected: str) -> None:
        super().__init__(f"option {name}={value!r}: expected {expected}.")


class VerifyError(Int8CompileError):
    """A rewritten graph breaks a rule of ``passes/verify.py``. That is a bug in this package, never in the model."""

    def __init__(self, problem: str, graph_text: str) -> None:
        super().__init__(
            f"{problem}\nThis is a bug in int8compile: please report it with the graph below. To go on "
            f"meanwhile, pass options={{'disable_passes': [...]}} with the pass at fault.\n{graph_text}"
        )


class KernelBuildError(Int8CompileError, RuntimeError):
    """Native code could not be built; carries the compiler's own lines."""


class CaptureError(Int8CompileError, TypeError):
    """``explain`` was given something that cannot be called, or a golden something that cannot be traced."""


class ModuleError(Int8CompileError, ValueError):
    """``quantize_`` or ``dequantize_`` was given something it cannot change in place. Nothing was changed."""


class CheckpointError(Int8CompileError, ValueError):
    """A checkpoint's entry that is missing, or is not what its name says."""

    def __init__(self, key: str, problem: str, expected: str, file: object = None) -> None:
        where = f"{file}: " if file is not None else ""
        super().__init__(f"{where}{key} {problem}; expected {expected}.")


class CalibrationError(Int8CompileError, ValueError):
    """A calibration that is damaged or of another model, or batches that none can be made of."""


class ExportError(Int8CompileError, TypeError):
    """``export`` or ``package`` was given something that it cannot take."""


class ProgramFileError(Int8CompileError, ValueError):
    """A file that ``load`` or ``load_package`` refuses.

    It is not int8compile's, is damaged, has another format version, holds pickled content or unknown operators, or is a
    package for another CPU, GPU or torch.
    """


class ModelNameError(Int8CompileError, ValueError):
    """A name on the command line that stands for no model."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"model {name!r}: {problem}")
