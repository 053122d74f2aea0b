"""Finds the modules of a model that are in training mode and compute something else because of it.

The flag ``training`` alone says little: a container or a wrapper around a model in ``eval()`` still has the True that
it was made with, and nothing reads it. So the flag counts only for modules whose results depend on it:

- PyTorch's own modules that drop values, use the statistics of a batch or draw random numbers, unless their settings
  make ``training`` irrelevant (a dropout of 0, a batch norm without running statistics);
- any other module, if a method of its class reads ``training``. A function outside the class that reads it is not seen.
  A method that reads it to no effect (for a dropout of 0) counts all the same.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from int8compile.torch_internals import modules

_OF_PYTORCH: tuple[tuple[type[nn.Module], Callable[[Any], bool]], ...] = (
    (modules.InstanceNorm, lambda module: module.track_running_stats),  # before batch norms, which these are by class
    (modules.BatchNorm, lambda module: module.running_mean is not None or module.track_running_stats),
    (modules.Dropout, lambda module: module.p > 0),
    (nn.RReLU, lambda module: module.lower != module.upper),
    (nn.MultiheadAttention, lambda module: module.dropout > 0),
    (nn.RNNBase, lambda module: module.dropout > 0 and module.num_layers > 1),
)
_DESCRIBING = ("__init__", "__repr__", "extra_repr", "__getstate__", "__setstate__", "train", "eval")


def modules_in_training(model: nn.Module) -> list[str]:
    """The names of a model's modules that are in training mode and would compute something else in ``eval()``."""
    return [name for name, module in model.named_modules() if module.training and _cares(module)]


def _cares(module: nn.Module) -> bool:
    kind: Any = type(module)
    if kind.__module__.startswith("torch.nn."):
        return next((cares(module) for family, cares in _OF_PYTORCH if isinstance(module, family)), False)
    return _reads_training(kind) or any(cares(module) for family, cares in _OF_PYTORCH if isinstance(module, family))


@functools.cache
def _reads_training(kind: Any) -> bool:
    """Whether a method of a class, or of those it is made of but for PyTorch's, reads an attribute of that name."""
    classes = [cls for cls in kind.__mro__ if not cls.__module__.startswith("torch.nn.")]
    members = [value for cls in classes for name, value in vars(cls).items() if name not in _DESCRIBING]
    return any(_reads(code) for member in members for code in _codes(member))


def _codes(member: Any) -> Iterator[types.CodeType]:
    """Of a function, whatever it is wrapped in."""
    if isinstance(member, property):
        yield from _codes(member.fget)
    elif isinstance(member, (staticmethod, classmethod)):
        yield from _codes(member.__func__)
    elif callable(member) and not isinstance(member, type):
        code = getattr(inspect.unwrap(member), "__code__", None)
        if isinstance(code, types.CodeType):
            yield code


def _reads(code: types.CodeType) -> bool:
    """In it or in a function within it: ``x.training``, or ``getattr(x, "training")``."""
    for step in dis.get_instructions(code):
        if step.argval == "training" and step.opname.startswith(("LOAD_ATTR", "LOAD_METHOD", "LOAD_CONST")):
            return True
    return any(_reads(inner) for inner in code.co_consts if isinstance(inner, types.CodeType))
