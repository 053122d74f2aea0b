"""Converts entries of a checkpoint in ``from_pretrained``: quantises floats, takes int8 ones of linears as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from int8compile.config import Int8Config
from int8compile.errors import CheckpointError
from int8compile.integrations.transformers.parallel import quantize_shard
from int8compile.modules.inplace import is_float_linear, matrix_shape
from int8compile.modules.int8_experts import Int8Experts
from int8compile.modules.int8_linear import Int8Linear, is_conv1d
from int8compile.torch_internals.dtensors import is_dtensor
from int8compile.weights.formats import SCALE, read_int8_weight
from int8compile.weights.int8_weight import Int8Weight

Entries = dict[str, Any]


class Quantize(ConversionOps):  # type: ignore[misc]
    """A float weight of the checkpoint to int8, one tensor at a time."""

    def __init__(self, loaded: set[str]) -> None:
        """``loaded``: takes the paths of the modules that get their weights."""
        self.loaded = loaded

    def convert(
        self, input_dict: Entries, model: Any = None, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> Entries:
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.int8 for value in input_dict.values()):
            return input_dict  # of experts, which were quantised one by one
        result: Entries = {}
        for key, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            path = key.rpartition(".")[0]
            module = model.get_submodule(path)
            if isinstance(module, Int8Experts):
                result |= self._experts(key, module, value, missing_keys)
                continue
            expected = (module.out_features, module.in_features)
            expected = expected[::-1] if module.stored_transposed else expected
            if is_dtensor(module.weight):
                result |= _tensors(path, quantize_shard(value, module.weight))
                self.loaded.add(path)
                continue
            if tuple(value.shape) != expected:  # which transformers reports, or ignores if it is told to
                _to_float_skeleton(model, path, module, missing_keys)
                result[key] = value
                continue
            result |= _tensors(path, Int8Weight.quantize(value, module.stored_transposed))
            self.loaded.add(path)
        return result

    def _experts(self, key: str, module: Int8Experts, value: torch.Tensor, missing_keys: set[str] | None) -> Entries:
        name = key.rpartition(".")[2]
        if tuple(value.shape) != tuple(module.dequantize(name).shape):
            module.dequantize_weight_(name)
            (missing_keys or set()).discard(key + SCALE)
            return {key: value}
        self.loaded.add(key)
        return dict(zip((key, key + SCALE), Int8Weight.quantize(value, module.is_transposed), strict=True))


class Reading(ConversionOps):  # type: ignore[misc]
    """What reads int8 checkpoints, in which the file decides what is int8.

    Entries come as the file has them, so that scales are never rounded to the model's dtype; ``dtype``, if any, is what
    a float weight is cast to.
    """

    def __init__(self, config: Int8Config, loaded: set[str]) -> None:
        """``loaded``: takes the paths of the modules that get int8 weights, of experts those of the weights."""
        self.config, self.loaded = config, loaded
        self.dtype: torch.dtype | None = None


class Deserialize(Reading):
    """Entries of an int8 checkpoint, ours or bitsandbytes', as they are; what is float in it stays float.

    The checkpoint decides what is int8: where it disagrees with the model that was prepared for it (a bitsandbytes
    checkpoint has other rules), the module is exchanged.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Deserialize:
        return Deserialize(self.config, self.loaded)  # transformers copies operations for every weight

    def convert(
        self,
        input_dict: Entries,
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Entries:
        found = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
        path = full_layer_name.rpartition(".")[0]
        module, weight = model.get_submodule(path), found.get("weight")
        if set(found) == {"weight"} and weight is not None and weight.dtype != torch.int8:
            dtype = self.dtype
            if isinstance(module, Int8Linear):
                dtype = module.float_dtype
                _to_float_skeleton(model, path, module, missing_keys)
            is_float = weight.is_floating_point() and dtype is not None and dtype.is_floating_point
            return {full_layer_name: weight.to(dtype) if is_float else weight}
        if isinstance(module, Int8Linear):
            shape = (module.out_features, module.in_features)
        elif is_float_linear(module):
            shape = matrix_shape(module)
        else:
            raise CheckpointError(full_layer_name, "is int8", f"a float tensor for a {type(module).__name__}")
        if weight is not None and weight.dtype == torch.int8 and weight.shape[:2] != shape:
            if isinstance(module, Int8Linear):
                _to_float_skeleton(model, path, module, missing_keys)
            codes = weight.flatten(1)  # without what marks the first one
            return {full_layer_name: codes.t() if is_conv1d(model.get_submodule(path)) else codes}
        int8_weight = read_int8_weight(found, f"{path}.", shape)
        assert int8_weight is not None
        if not isinstance(module, Int8Linear):
            model.set_submodule(path, Int8Linear.from_float(module, self.config, paths=(path,)))
        untie_(model, f"{path}.weight")
        self.loaded.add(path)
        return _tensors(path, int8_weight)


def untie_(model: Any, name: str) -> None:
    """An int8 weight is tied to no float one any more, whatever the model's configuration says."""
    tied = getattr(model, "all_tied_weights_keys", {})
    for target, source in list(tied.items()):
        if name in (target, source):
            del tied[target]


def _tensors(path: str, int8_weight: Int8Weight) -> Entries:
    return {f"{path}.{name}": tensor for name, tensor in int8_weight._asdict().items()}


def _to_float_skeleton(model: Any, path: str, module: Int8Linear, missing_keys: set[str] | None) -> None:
    """Exchange an empty ``Int8Linear`` for an empty float linear, which has no scale for transformers to miss."""
    if missing_keys is not None:
        missing_keys.discard(f"{path}.weight_scale")
    new = module.to_float()
    assert isinstance(new.weight, nn.Parameter)
    model.set_submodule(path, new.requires_grad_(True))
