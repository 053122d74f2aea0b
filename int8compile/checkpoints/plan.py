"""Which tensors of a float checkpoint become int8, by the rules of ``from_pretrained``, on a model without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

import int8compile
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.integrations.transformers import Int8Config, refused_linears
from int8compile.integrations.transformers.experts import splits
from int8compile.integrations.transformers.saving import ignored, quantization_config
from int8compile.modules.find_experts import find_experts
from int8compile.modules.inplace import find_linears
from int8compile.modules.int8_linear import is_conv1d
from int8compile.report import Reason
from int8compile.selection import unmatched, weight_only_by
from int8compile.weights.formats import SCALE, entries, mark
from int8compile.weights.int8_weight import Int8Weight


class Plan:
    """Which of a checkpoint's tensors become int8, and how."""

    def __init__(self, model: Any, keys: list[str], config: Int8Config, format: str) -> None:
        """For a float model on the meta device, and the keys of its checkpoint."""
        self.config, self.format, self._model = config, format, model
        self.dtype = model.config.dtype
        core = config.to_core()
        if format != "int8compile" and core.activation == "float":
            raise OptionValueError("format", format, "'int8compile': the others quantise activations")
        self._names = _Names(model)
        places = [self._names.in_model(key) for key in keys]
        refused = refused_linears(model, self.dtype, format) | _refused_by_format(model, places, core, format)
        found = find_linears(model, core, refused=refused)
        experts = find_experts(model, core, refused=refused)
        if format == "compressed-tensors":
            if any(is_conv1d(f.module) for f in found):
                raise OptionValueError("format", format, "another one for this model: that format knows no Conv1D")
            # Served experts are int8 or float as a whole.
            partly = {path for f in experts if len(f.chosen) < len(f.sites) for path in f.paths}
            refused |= dict.fromkeys(partly, (Reason.SKIPPED, f"float to {format}"))
            experts = find_experts(model, core, refused=refused)
        self._left = [f.site.path for f in found if not f.site.rewritten]
        self.sites = [f.site for f in found] + [site for f in experts for site in f.sites.values()]
        self.unmatched = list(unmatched(core, self.sites))
        int8 = [f for f in found if f.site.reason is Reason.REWRITTEN]
        self._int8 = {f"{path}.weight": _Weight.of(f.module, "weight") for f in int8 for path in f.paths}
        self._linears = [path for f in int8 for path in f.paths]
        self._int8 |= {
            f"{path}.{name}": _Weight.of(f.module, name, experts=True)
            for f in experts
            for name in f.chosen
            for path in f.paths
        }
        # The first in the model's order, like save_pretrained; a checkpoint's order is its own.
        there = {place.name for place in places}
        marked = next((name for name in self._int8 if name in there), None)
        self._marked = marked if format == "int8compile" else None

    def convert(self, key: str, tensor: torch.Tensor, file: Path) -> dict[str, torch.Tensor]:
        """What stands in the int8 checkpoint for one tensor of the float one."""
        place = self._names.in_model(key)
        weight = self._int8.get(place.name)
        if weight is None:
            return {key: tensor.contiguous()}
        shape = weight.shape if place.parts is None else weight.part(place.parts)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            problem = f"is {tensor.dtype} {list(tensor.shape)}"
            raise CheckpointError(key, problem, f"float {list(shape)}, as the model has it", file)
        # As from_pretrained would: first to the model's dtype.
        tensor = tensor.to(self.dtype) if self.dtype is not None else tensor
        int8_weight = Int8Weight.quantize(tensor, weight.transposed and place.parts is None)
        if weight.experts and place.parts is None:
            result = {key: int8_weight.weight, key + SCALE: int8_weight.weight_scale}
        else:
            prefix = key.removesuffix("weight")
            result = {f"{prefix}{name}": value for name, value in entries(int8_weight, self.format).items()}
        if place.name == self._marked:
            result[key] = mark(result[key])
        return result

    def quantization_config(self) -> dict[str, Any]:
        left, int8 = self._left, [*self._linears, *(name for name, weight in self._int8.items() if weight.experts)]
        if self.format == "compressed-tensors":
            left = ignored(self._model, int8, left)
        made = quantization_config(self.config, int8, left, self.format)
        return made if isinstance(made, dict) else dict(made.to_dict())


class _Weight(NamedTuple):
    """A float weight that becomes int8: its shape in the model, and in which order that is."""

    shape: tuple[int, ...]
    transposed: bool
    experts: bool = False

    @classmethod
    def of(cls, module: nn.Module, name: str, *, experts: bool = False) -> _Weight:
        transposed = bool(module.is_transposed) if experts else is_conv1d(module)
        return cls(tuple(getattr(module, name).shape), transposed, experts)

    def part(self, parts: int) -> tuple[int, ...]:
        """The shape of one expert's matrix in a checkpoint, of which so many are joined by their rows."""
        _, n, k = self.shape
        return n // parts, k


class _Place(NamedTuple):
    """Where a tensor of a checkpoint goes.

    Args:
        name: of the model's weight; empty if the tensor is joined with others in a way that int8 codes cannot be, and
            so stays as it is.
        parts: None if it is that weight; else it is one expert's matrix, or that many of them are.
        stays: the model's name of such a weight as has none.
    """

    name: str
    parts: int | None = None
    stays: str = ""


class _Names:
    """From a checkpoint's names to those of the model, as transformers renames them while loading."""

    def __init__(self, model: Any) -> None:
        mapping = get_model_conversion_mapping(model)
        self._renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        self._converters = [m for m in mapping if isinstance(m, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self._prefix, self._state = model.base_model_prefix, model.state_dict()

    def in_model(self, key: str) -> _Place:
        """Where a tensor goes."""
        name, pattern = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if pattern is None:
            return _Place(name)
        conversion = self._by_pattern[pattern]
        return _Place(name, len(conversion.source_patterns)) if splits(conversion) else _Place("", stays=name)


def _refused_by_format(
    model: Any, places: list[_Place], core: int8compile.Int8Config, format: str
) -> dict[str, tuple[Reason, str]]:
    """What cannot be int8 in a checkpoint: experts that are joined while loading, and what a format has no form for."""
    refused = {place.stays: (Reason.EXPERTS, "joined while loading") for place in places if place.stays}
    if format == "int8compile":
        return refused
    names = {path for path, _ in model.named_modules(remove_duplicate=False)}
    names |= {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.dim() == 3}
    whole = {place.name for place in places if place.parts is None and not place.name.endswith(".weight")}
    floats = {name for name in names if weight_only_by(name, core) is not None} | (names & whole)
    return refused | dict.fromkeys(floats, (Reason.SKIPPED, f"float to {format}"))
