"""Experts in checkpoints: transformers' conversions of their weights, for int8 codes and their scales.

Most checkpoints hold each expert's matrices by themselves (``experts.3.w1.weight``), and transformers stacks them into
a model's ``experts.gate_up_proj`` by a ``WeightConverter``; some hold them as the model does. An int8 checkpoint keeps
the names of the float one:

    experts.3.w1.weight  float [N, K]       ->  the same, int8; experts.3.w1.weight_scale, fp32 [N]
    experts.down_proj  float [E, N, K]      ->  the same, int8; experts.down_proj_scale, fp32 [E, N]
    experts.down_proj  float [E, K, N]      ->  int8 [E, N, K], as everywhere; experts.down_proj_scale, fp32 [E, N]

The first where the conversion does no more than stack and join rows, which it can do to codes and scales alike
(``splits``). Where it does anything else, the checkpoint holds the int8 weights as the model does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
)

from int8compile.config import Int8Config
from int8compile.errors import CheckpointError
from int8compile.integrations.transformers.loading import Entries, Reading, untie_
from int8compile.modules.int8_experts import Int8Experts, is_experts, weight_names
from int8compile.modules.places import carry_hooks
from int8compile.weights.formats import SCALE, read_experts_weight
from int8compile.weights.int8_weight import FloatWeight, Int8Weight


def int8_weights(model: nn.Module) -> Iterator[tuple[str, Int8Experts, str]]:
    """Of every int8 weight of experts its path, at every place, the module and its name in it."""
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8Experts):
            yield from ((f"{path}.{name}", module, name) for name in module.int8)


def splits(conversion: Any) -> bool:
    """Whether a conversion stacks matrices of single experts, and joins their rows, and does no more."""
    if not isinstance(conversion, WeightConverter) or len(_targets(conversion)) != 1:
        return False
    if not all("*" in source and source.endswith(".weight") for source in _sources(conversion)):
        return False
    merge, *rest = conversion.operations
    joins = [type(op) is Concatenate and op.dim == 1 and op.num_shards_attribute is None for op in rest]
    joined = joins == [True] if len(_sources(conversion)) > 1 else not joins
    return type(merge) is MergeModulelist and merge.dim == 0 and joined


def conversions_for_quantizing(conversions: list[Any], model: nn.Module, loaded: set[str]) -> list[Any]:
    """A model's conversions, of which those that stack experts quantise each of them first."""
    keys = [key for key, *_ in int8_weights(model)]
    return [
        conversion.copy(_sources(conversion), _targets(conversion), operations=[Stack(loaded, conversion.operations)])
        if splits(conversion) and any(_makes(conversion, key) for key in keys)
        else conversion
        for conversion in conversions
    ]


def conversions_for_loading(
    conversions: list[Any], model: nn.Module, config: Int8Config, loaded: set[str]
) -> list[Any]:
    """A model's conversions, of which those for experts read int8 checkpoints, and float experts in them.

    Args:
        config, loaded: as of ``Reading``.
    """
    modules = [(path, m) for path, m in model.named_modules() if isinstance(m, Int8Experts) or is_experts(m)]
    keys = [f"{path}.{name}" for path, module in modules for name in weight_names(module)]
    if not keys:
        return conversions
    made: list[Any] = []
    for conversion in conversions:
        if isinstance(conversion, WeightConverter) and any(_makes(conversion, key) for key in keys):
            sources, operations = _sources(conversion), [ReadExperts(config, loaded, conversion.operations)]
            scales = [source + SCALE for source in sources] if splits(conversion) else []
            conversion = conversion.copy(sources + scales, _targets(conversion), operations=operations)
        made.append(conversion)
    for name in sorted({key.rpartition(".")[2] for key in keys}):
        sources = [rf"\.{name}$", rf"\.{name}{SCALE}$"]
        made.append(WeightConverter(sources, f".{name}", [ReadExperts(config, loaded)]))
    return made


def conversions_for_saving(model: Any, *, single: bool = False) -> list[Any] | None:
    """The conversions that ``save_pretrained`` is to revert for a model with int8 experts; None: transformers' own.

    Args:
        single: whether each expert is to have entries of its own, though the model came from a checkpoint without.
    """
    keys, conversions = [key for key, *_ in int8_weights(model)], _of_loading(model)
    if not keys:
        return conversions
    if conversions is None or (single and not all(_maker(conversions, key) for key in keys)):
        usual = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [conversion for conversion in usual if not isinstance(conversion, PrefixChange)]
    makers = [_maker(conversions, key) for key in keys]
    made: list[Any] = []
    for conversion in conversions:
        of_experts = any(conversion is maker for maker in makers)
        if splits(conversion) or not of_experts:
            made.append(conversion)
        if splits(conversion) and of_experts:
            sources, targets = ([name + SCALE for name in names(conversion)] for names in (_sources, _targets))
            made.append(conversion.copy(sources, targets, operations=list(conversion.operations)))
    return made


def without_single_form(model: Any) -> list[str]:
    """Paths of int8 weights that no conversion takes apart into matrices of single experts."""
    conversions = conversions_for_saving(model, single=True) or []
    return [key for key, *_ in int8_weights(model) if not splits(_maker(conversions, key))]


def has_single_form(model: Any) -> bool:
    """Whether a float model's checkpoints have its experts' matrices by themselves."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    experts = [(path, module) for path, module in model.named_modules() if is_experts(module)]
    keys = [f"{path}.{name}" for path, module in experts for name in weight_names(module)]
    return any(splits(_maker(conversions, key)) for key in keys)


def name_on_disk(model: Any, path: str) -> str:
    """The name of a module in a checkpoint, where transformers has another for it."""
    key, conversions = f"{path}.weight", conversions_for_saving(model, single=True)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    for conversion in conversions[::-1]:
        if isinstance(conversion, WeightRenaming) and not isinstance(conversion, PrefixChange):
            key, _ = conversion.reverse_transform().rename_source_key(key)
    return key.removesuffix(".weight")


class Stack(ConversionOps):  # type: ignore[misc]
    """Float matrices of single experts to one int8 weight, one by one: their stack in float is never there."""

    def __init__(self, loaded: set[str], operations: Iterable[ConversionOps]) -> None:
        """``operations``: the model's own, for experts that stay float, or are not of the model's shape."""
        self.loaded, self.operations = loaded, list(operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> Stack:
        return Stack(self.loaded, [copy.copy(op) for op in self.operations])

    def convert(
        self,
        input_dict: Entries,
        source_patterns: list[str],
        model: Any = None,
        full_layer_name: str = "",
        **kwargs: Any,
    ) -> Entries:
        path, _, name = full_layer_name.rpartition(".")
        module, parts = model.get_submodule(path), [input_dict.get(pattern, []) for pattern in source_patterns]
        shape = module.shape_of(name) if isinstance(module, Int8Experts) and name in module.int8 else (0, 0, 0)
        one = (shape[1] // len(parts), shape[2])
        if any(len(part) != shape[0] or any(tuple(tensor.shape) != one for tensor in part) for part in parts):
            for op in self.operations:
                given = {"source_patterns": source_patterns, "model": model, "full_layer_name": full_layer_name}
                input_dict = op.convert(input_dict, **given, **kwargs)
            return input_dict
        input_dict.clear()
        made = Int8Weight.of_shape(shape, parts[0][0].device)
        for i, part in enumerate(parts):
            for expert in range(shape[0]):
                rows = Int8Weight(made.weight[expert], made.weight_scale[expert]).rows(i * one[0], one[0])
                rows.fill(FloatWeight(part[expert]))
                part[expert] = None
        self.loaded.add(full_layer_name)
        return dict(zip((full_layer_name, full_layer_name + SCALE), made, strict=True))


class ReadExperts(Reading):
    """What an int8 checkpoint has for one weight of a layer's experts, as one entry or as many; float ones too.

    As in ``Deserialize``, the checkpoint decides what is int8.
    """

    def __init__(self, config: Int8Config, loaded: set[str], operations: Iterable[ConversionOps] = ()) -> None:
        """``operations``: those of the model's own conversion, which codes and scales go through."""
        super().__init__(config, loaded)
        self.operations = list(operations)

    def __deepcopy__(self, memo: dict[int, Any]) -> ReadExperts:
        return ReadExperts(self.config, self.loaded, [copy.copy(op) for op in self.operations])

    def convert(
        self,
        input_dict: Entries,
        source_patterns: list[str],
        target_patterns: list[str],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> Entries:
        path, _, name = full_layer_name.rpartition(".")
        if twice := set(input_dict).difference(source_patterns):
            problem = f"is there twice, as {', '.join(sorted(twice | set(source_patterns)))}"
            raise CheckpointError(full_layer_name, problem, "one entry, or one of each expert")
        found = {p: value if isinstance(value, list) else [value] for p, value in input_dict.items()}
        input_dict.clear()  # what is stacked is to be freed one by one
        scales = {p: found.pop(p) for p in list(found) if p.removesuffix("$").endswith(SCALE)}
        dtypes = {tensor.dtype for tensors in found.values() for tensor in tensors}
        given = {"source_patterns": source_patterns, "target_patterns": target_patterns, "model": model, **kwargs}
        module = model.get_submodule(path)
        if not scales and torch.int8 not in dtypes:
            dtype = self.dtype
            if isinstance(module, Int8Experts) and name in module.int8:
                dtype = module.float_dtype
                module.dequantize_weight_(name)
                (missing_keys or set()).discard(full_layer_name + SCALE)
            made = self._joined(found, given, full_layer_name)
            return {key: value.to(dtype) if _is_float(dtype, value) else value for key, value in made.items()}
        if dtypes - {torch.int8}:
            problem = f"is {', '.join(sorted(map(str, dtypes - {torch.int8})))} for some experts"
            raise CheckpointError(full_layer_name, problem, "int8 for all, or for none")
        module = _prepared(model, path, name, module, self.config)
        weight, weight_scale = (
            next(iter(self._joined(entries, given, full_layer_name).values()), None) for entries in (found, scales)
        )
        int8_weight = read_experts_weight(weight, weight_scale, full_layer_name, module.shape_of(name))
        assert int8_weight is not None
        self.loaded.add(full_layer_name)
        return dict(zip((full_layer_name, full_layer_name + SCALE), int8_weight, strict=True))

    def _joined(self, entries: Entries, given: dict[str, Any], full_name: str) -> Entries:
        """Entries as the model's own conversion makes them, under their names in the model if that is no other."""
        if not entries:
            return {}
        patterns = [p for p in given["source_patterns"] if p in entries]
        for operation in self.operations:
            entries = operation.convert(entries, **{**given, "source_patterns": patterns, "full_layer_name": full_name})
        if len(entries) > 1:  # a conversion to several weights, which names them itself
            return entries
        value = next(iter(entries.values()))
        return {full_name: value[0] if isinstance(value, list) else value}


def _is_float(dtype: torch.dtype | None, value: torch.Tensor) -> bool:
    """Whether a value of a checkpoint is to be cast to a dtype."""
    return dtype is not None and dtype.is_floating_point and value.is_floating_point()


def _prepared(model: Any, path: str, name: str, module: nn.Module, config: Int8Config) -> Int8Experts:
    """The module that takes int8 entries: where the checkpoint has them and the model does not, it is exchanged."""
    if not isinstance(module, Int8Experts):
        if not is_experts(module) or name not in weight_names(module):
            raise CheckpointError(f"{path}.{name}", "is int8", f"a float tensor for a {type(module).__name__}")
        new = Int8Experts.from_float(module, config, paths=(path,), names=[name])
        carry_hooks(module, new)
        model.set_submodule(path, new)
        module = new
    elif name not in module.int8:
        module.quantize_weight_(name, config, (path,))
    untie_(model, f"{path}.{name}")
    return module


def _of_loading(model: Any) -> list[Any] | None:
    """The model's own conversions by which it was loaded; None if it was not."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        return None
    made = []
    for conversion in conversions:
        ours = [op for op in getattr(conversion, "operations", ()) if isinstance(op, (Reading, Stack))]
        if not ours and not all(target.endswith(SCALE) for target in _targets(conversion)):
            made.append(conversion)
        elif ours and isinstance(ours[0], (ReadExperts, Stack)) and ours[0].operations:
            sources = [source for source in _sources(conversion) if not source.endswith(SCALE)]
            made.append(conversion.copy(sources, _targets(conversion), operations=ours[0].operations))
    return made


def _maker(conversions: list[Any], key: str) -> Any:
    """The conversion that makes the weight of that name in a model, the last of them as transformers looks; or None."""
    able = (c for c in conversions[::-1] if isinstance(c, WeightConverter) and _makes(c, key))
    return next(able, None)


def _makes(conversion: Any, key: str) -> bool:
    """Whether a conversion makes the weight of that name in a model."""
    back = WeightRenaming(_targets(conversion), _sources(conversion))
    back.scope_prefix, back.base_model_prefix = conversion.scope_prefix, conversion.base_model_prefix
    return back.rename_source_key(key)[1] is not None


# What a conversion was made with; it changes its patterns.
def _sources(conversion: Any) -> list[str]:
    return list(conversion._original_source_patterns)


def _targets(conversion: Any) -> list[str]:
    return list(conversion._original_target_patterns)
