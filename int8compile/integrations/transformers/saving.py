"""Makes what ``save_pretrained`` writes in each format: a state dict and its ``quantization_config``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.integrations.accelerate import load_offloaded_parameter

from int8compile.config import WEIGHTS_ONLY
from int8compile.integrations.transformers import bitsandbytes
from int8compile.integrations.transformers.experts import int8_weights, name_on_disk, without_single_form
from int8compile.integrations.transformers.parallel import gathered
from int8compile.modules.inplace import is_float_linear
from int8compile.modules.int8_experts import Int8Experts, is_experts, weight_names
from int8compile.modules.int8_linear import Int8Linear
from int8compile.modules.places import is_offloaded
from int8compile.weights.formats import SCALE, entries, mark
from int8compile.weights.int8_weight import Int8Weight


def linear_paths(model: nn.Module) -> tuple[list[str], list[str]]:
    """Every path of the int8 linears of a model, and of the float ones; of experts, those of their int8 weights."""
    modules = list(model.named_modules(remove_duplicate=False))
    int8 = [path for path, module in modules if isinstance(module, Int8Linear)]
    int8 += [path for path, *_ in int8_weights(model)]
    return int8, [path for path, module in modules if is_float_linear(module)]


def saved_as_float(model: Any, format: str) -> set[str]:
    """Every path of the int8 linears, and of experts' int8 weights, that a format has no int8 form for."""
    if format == "int8compile":
        return set()
    modules = model.named_modules(remove_duplicate=False)
    # The others quantise every activation.
    linears = {path for path, m in modules if isinstance(m, Int8Linear) and m.outlier_policy == WEIGHTS_ONLY}
    experts = {path for path, m, name in int8_weights(model) if m.int8[name][1] == WEIGHTS_ONLY}
    if format == "bitsandbytes":
        int8, _ = linear_paths(model)
        return linears | bitsandbytes.float_linears(model).intersection(int8) | {p for p, *_ in int8_weights(model)}
    # Served experts are int8 or float as a whole.
    experts |= {path for path, m, _ in int8_weights(model) if len(m.int8) < len(weight_names(m))}
    experts |= set(without_single_form(model))
    layers = {path.rpartition(".")[0] for path in experts}
    return linears | {path for path, *_ in int8_weights(model) if path.rpartition(".")[0] in layers}


def ignored(model: Any, int8: Collection[str], left: Collection[str]) -> list[str]:
    """What compressed-tensors' list of modules to ignore says of a model, by the names on the disk.

    Routers are linears to those who read it, and the experts of a layer are linears of their own.

    Args:
        int8, left: as of ``quantization_config``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    experts = {path: m for path, m in modules.items() if isinstance(m, Int8Experts) or is_experts(m)}
    layers, known = {path.rpartition(".")[0] for path in experts}, {*int8, *left}
    routers = [
        path
        for path, module in modules.items()
        if path.rpartition(".")[0] in layers and path not in known and _is_matrix(module)
    ]
    names = [name_on_disk(model, path) for path in (*left, *routers)]
    floats = [p for p, m in experts.items() if not all(f"{p}.{name}" in known for name in weight_names(m))]
    return [*names, *(rf"re:^{re.escape(name_on_disk(model, path))}\..*" for path in floats)]


def _is_matrix(module: nn.Module) -> bool:
    """Whether a module has a weight such as a linear's, which routers have."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return weight is not None and weight.dim() == 2


def state_dict(model: nn.Module, format: str, as_float: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """A model's state dict in one of ``formats.FORMATS``; its tensors are the model's own.

    Args:
        as_float: paths of linears, and of experts' weights, whose codes are written as the floats that they stand for.
    """
    result = {name: gathered(value) for name, value in model.state_dict().items()}
    written: set[int] = set()
    marked = _put_linears(result, model, format, as_float, written) or format != "int8compile"
    for path, module, _ in int8_weights(model):
        int8_weight = Int8Weight(result.pop(path), result.pop(path + SCALE))
        if is_offloaded(module):
            int8_weight = Int8Weight(*(load_offloaded_parameter(model, key) for key in (path, path + SCALE)))
        if path in as_float:
            result[path] = int8_weight.dequantize(module.float_dtype, module.is_transposed)
            continue
        int8_weight = _unshared(int8_weight, written)
        scale = int8_weight.weight_scale
        result[path] = int8_weight.weight if marked else mark(int8_weight.weight)
        result[path + SCALE] = scale.unsqueeze(-1) if format == "compressed-tensors" else scale
        marked = True
    return dict(result)


def _put_linears(
    result: dict[str, torch.Tensor], model: nn.Module, format: str, as_float: Collection[str], written: set[int]
) -> bool:
    """Put the entries of int8 linears into a state dict; whether one was marked."""
    marked = format != "int8compile"
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
        int8_weight = _unshared(int8_weight, written)
        for name, tensor in entries(int8_weight, format).items():
            result[f"{path}.{name}"] = tensor
        if not marked:
            result[names["weight"]], marked = mark(int8_weight.weight), True
    return marked


def _unshared(int8_weight: Int8Weight, written: set[int]) -> Int8Weight:
    """A copy, if there is another entry with these codes: transformers would leave out what two modules share."""
    shared = (place := int8_weight.weight.data_ptr()) in written
    written.add(place)
    return Int8Weight(*(tensor.clone() for tensor in int8_weight)) if shared else int8_weight


def quantization_config(ours: Any, int8: Collection[str], left: Collection[str], format: str) -> Any:
    """What a saved ``config.json`` says of a model whose linears ``int8`` are int8 and those ``left`` are float.

    Args:
        ours: the ``Int8Config`` of the model.
        int8, left: module paths; of experts, those of their int8 weights.

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
