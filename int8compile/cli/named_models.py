"""How the command line names a model: a transformers folder or hub name, or ``module:function``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any, NamedTuple

import torch

from int8compile.checkpoints.example_inputs import example_inputs
from int8compile.errors import ModelNameError


class NamedModel(NamedTuple):
    """A model with what it is called with, as for ``torch.export.export``."""

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any


def find(name: str) -> NamedModel:
    """The model of this name, in evaluation mode.

    Args:
        name: ``module:function``, where the function returns ``(model, args)``, ``(model, args, kwargs)`` or
            ``(model, args, kwargs, dynamic_shapes)``, and the module is looked for in the current folder too; anything
            else is what ``from_pretrained`` of transformers takes, called with its main input (token ids, an image, a
            sound) of any batch size, and with token ids for its decoder if it has one.

    Raises:
        ModelNameError: there is no such model, or its inputs cannot be guessed.
    """
    return _from_function(name) if ":" in name and not os.path.exists(name) else _from_transformers(name)


def _from_function(name: str) -> NamedModel:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ModelNameError(
            name, f"{error}; expected module:function, such as models:tiny for tiny() of models.py"
        ) from error
    made = make()  # whose errors are the user's own, with their traceback
    if not isinstance(made, tuple) or not 2 <= len(made) <= 4 or not isinstance(made[0], torch.nn.Module):
        raise ModelNameError(
            name, f"{function}() returned {type(made).__name__}; expected (model, args[, kwargs[, shapes]])"
        )
    model, args, kwargs, shapes = (*made, None, None)[:4]
    if not isinstance(args, (tuple, list)):
        problem = f"{function}() returned a {type(args).__name__} as args; expected a tuple, such as (x,)"
        raise ModelNameError(name, problem)
    return NamedModel(model.eval(), tuple(args), dict(kwargs or {}), shapes)


def _from_transformers(name: str) -> NamedModel:
    try:
        import transformers
    except ImportError as error:
        raise ModelNameError(name, "a transformers model needs pip install 'int8compile[transformers]'") from error
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ModelNameError(name, "there is no such folder")
    transformers.logging.disable_progress_bar()  # the command line has bars of its own
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        architecture = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        model = architecture.from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise ModelNameError(name, str(error)) from error
    model.config.use_cache = False  # a cache is no output that torch.export knows
    inputs = example_inputs(model, length=8)
    if inputs is None:
        raise ModelNameError(
            name,
            f"the inputs of {type(model).__name__} cannot be guessed; write a function and name it module:function",
        )
    kwargs = {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.tensors.items()
    }
    return NamedModel(model, (), kwargs, inputs.dynamic_shapes)
