"""Finds the linears of a transformers model that bitsandbytes makes int8, and the list of modules it skips.

transformers reads a checkpoint of that format by rules that differ from int8compile's: it matches the list by suffix
and by regular expression, and leaves ``_keep_in_fp32_modules``, subclasses of ``nn.Linear`` and all but one place of a
shared module in float, whatever the list says. If a checkpoint held int8 codes for a linear that transformers builds in
float, the codes would be read as floats. So its rule is evaluated before anything is written: a linear that it cannot
have in int8 is written as the floats that the codes mean, and a list that it would understand differently is never
written. bitsandbytes need not be installed.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.quantizers.quantizers_utils import should_convert_module

from int8compile.errors import OptionValueError
from int8compile.modules.inplace import is_float_linear
from int8compile.modules.int8_linear import Int8Linear


def float_linears(model: Any) -> set[str]:
    """Paths of linears that bitsandbytes builds in float, whatever its list of modules to skip.

    Raises:
        OptionValueError: it builds another model than this one, and so cannot read any checkpoint of it.
    """
    rebuilt = {type(module).__name__ for module in model.modules()}.intersection(MODULES_TO_PATCH_FOR_QUANTIZATION)
    for name in sorted(rebuilt):
        if "bitsandbytes" in MODULES_TO_PATCH_FOR_QUANTIZATION[name]["quantization_methods"]:
            expected = f"another one: loading for bitsandbytes, transformers puts other modules in place of {name}"
            raise OptionValueError("format", "bitsandbytes", expected)
    always = list(getattr(model, "_keep_in_fp32_modules", None) or [])
    replaced = {
        path
        for path, module in model.named_modules()  # a module at several paths: at the first one
        if _replaceable(module) and should_convert_module(path, always)
    }
    linears = (path for path, module in model.named_modules(remove_duplicate=False) if _is_linear(module))
    return {path for path in linears if path not in replaced}


def skip_list(left: Collection[str], int8: Collection[str]) -> list[str]:
    """The ``llm_int8_skip_modules`` by which bitsandbytes has the linears ``left`` in float and those ``int8`` in int8.

    Raises:
        OptionValueError: this transformers reads the list in a way unknown to us.
    """
    patterns = [_pattern(path, int8) for path in left]
    wrong = [path for path in left if should_convert_module(path, patterns)]
    wrong += [path for path in int8 if not should_convert_module(path, patterns)]
    if wrong:
        expected = f"another one: this transformers would not read {', '.join(wrong)} as they are in the model"
        raise OptionValueError("format", "bitsandbytes", expected)
    return patterns


def _pattern(path: str, int8: Collection[str]) -> str:
    """The path itself, or, where some transformers 5 would take it for one of ``int8`` too, no more than the path."""
    plain = re.fullmatch(r"[\w.]+", path)
    if plain and not any(other.endswith(path) or re.match(path, other) for other in int8):
        return path
    return f"^{re.escape(path)}$"


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, Int8Linear) or is_float_linear(module)


def _replaceable(module: nn.Module) -> bool:
    """Whether bitsandbytes' Linear8bitLt can take the place of what this linear is in a float model."""
    kind = module.float_type if isinstance(module, Int8Linear) else type(module)
    return kind is nn.Linear or issubclass(kind, Conv1D)
