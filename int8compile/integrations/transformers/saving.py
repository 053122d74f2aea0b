"""Makes what ``save_pretrained`` writes in each format: a state dict and its ``quantization_config``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.accelerate import load_offloaded_parameter

from int8compile.config import WEIGHTS_ONLY
from int8compile.integrations.transformers import bitsandbytes
from int8compile.modules.inplace import is_float_linear, is_offloaded
from int8compile.modules.int8_linear import Int8Linear
from int8compile.weights.formats import entries, mark
from int8compile.weights.int8_weight import Int8Weight


def linear_paths(model: nn.Module) -> tuple[list[str], list[str]]:
    """Every path of the int8 linears of a model, and of the float ones."""
    modules = list(model.named_modules(remove_duplicate=False))
    int8 = [path for path, module in modules if isinstance(module, Int8Linear)]
    return int8, [path for path, module in modules if is_float_linear(module)]


def weight_only_paths(model: nn.Module) -> set[str]:
    """Every path of the linears of which the weights alone are int8."""
    modules = model.named_modules(remove_duplicate=False)
    return {path for path, m in modules if isinstance(m, Int8Linear) and m.outlier_policy == WEIGHTS_ONLY}


def state_dict(model: nn.Module, format: str, as_float: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """A model's state dict in one of ``formats.FORMATS``; its tensors are the model's own.

    Args:
        as_float: paths of linears whose codes are written as the floats that they stand for.
    """
    result = model.state_dict()
    marked, written = format != "int8compile", set()
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, Int8Linear):
            continue
        names = {name: f"{path}.{name}" for name in ("weight", "weight_scale")}
        int8_weight = Int8Weight(*(result.pop(name) for name in names.values()))
        if is_offloaded(module):  # mapped from where it is, not read
            int8_weight = Int8Weight(*(load_offloaded_parameter(model, name) for name in names.values()))
        if path in as_float:
            result[names["weight"]] = int8_weight.dequantize(module.float_dtype, module.stored_transposed)
            continue
        if (place := int8_weight.weight.data_ptr()) in written:  # transformers would leave out what two linears share
            int8_weight = Int8Weight(*(tensor.clone() for tensor in int8_weight))
        written.add(place)
        for name, tensor in entries(int8_weight, format).items():
            result[f"{path}.{name}"] = tensor
        if not marked:
            result[names["weight"]], marked = mark(int8_weight.weight), True
    return dict(result)


def quantization_config(ours: Any, int8: Collection[str], left: Collection[str], format: str) -> Any:
    """What a saved ``config.json`` says of a model whose linears ``int8`` are int8 and those ``left`` are float.

    Args:
        ours: the ``Int8Config`` of the model.
        int8, left: module paths.

    Raises:
        OptionValueError: that format cannot say so.
    """
    if format == "bitsandbytes":
        # A list of its own replaces bitsandbytes' defaults, an empty one too; None would bring them back.
        skip = bitsandbytes.skip_list(left, int8)
        return BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=ours.llm_int8_threshold, llm_int8_skip_modules=skip
        )
    if format == "compressed-tensors":
        eight = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
        group = {
            "targets": ["Linear"],
            "weights": {**eight, "strategy": "channel", "dynamic": False},
            "input_activations": {**eight, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": list(left),
            "config_groups": {"group_0": group},
        }
    return ours
