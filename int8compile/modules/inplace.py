"""``quantize_`` and ``dequantize_``: turn a model's linears and experts into int8 modules and back, in place.

The rules of the compiler pass (``selection.py``) decide which linears, and the same kind of Report says why not the
others. All decisions are made before anything is changed. Then the model is converted layer by layer, and each float
weight is freed as soon as its int8 form exists, so that memory never exceeds the float model's by more than a layer.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from int8compile import selection
from int8compile.config import Int8Config
from int8compile.errors import ModuleError
from int8compile.hooks import transformers_integration
from int8compile.modules.find_experts import FoundExperts, convert_experts, find_experts, routers
from int8compile.modules.int8_experts import Int8Experts, is_experts
from int8compile.modules.int8_linear import Int8Linear, Int8MasterLinear, is_conv1d
from int8compile.modules.places import by_identity, is_offloaded, replace
from int8compile.native import providers
from int8compile.report import GraphReport, Reason, Report, Site, WeightUse
from int8compile.torch_internals.modules import uncompiled
from int8compile.torch_internals.tensors import storage_key
from int8compile.weights.int8_weight import Int8Weight

# Linears whose forward is their own and still no more than a linear.
_KNOWN_LINEARS = ("FalconLinear", "Int8MasterLinear")

# PyTorch's modules that read their linears' weights past the linears' own forward.
_FUSED_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclasses.dataclass(frozen=True)
class Found:
    """A linear of a model: the module, every path it stands at, and its Site."""

    module: nn.Module
    paths: tuple[str, ...]
    site: Site


def quantize_(model: nn.Module, config: object = None) -> Report:
    """Turn a model's linears (``nn.Linear`` and GPT-2's ``Conv1D``) into ``Int8Linear``, in place.

    The experts of transformers' mixtures become ``Int8Experts``; other modules' weights of several experts stay float.
    Weights that linears share stay shared. Biases, hooks and everything else stay as they are; weights no longer train,
    unless ``llm_int8_has_fp16_weight`` keeps them: then linears become ``Int8MasterLinear``.
    A model on the meta device becomes an int8 skeleton for ``load_state_dict(..., assign=True)``.

    Args:
        model: any module that contains linears; one compiled by ``torch.compile`` is compiled anew at its next call.
        config: as ``options`` of the backend: None, a dict, an ``Int8Config`` or a ``BitsAndBytesConfig``.

    Returns:
        a Report of every linear and every weight of experts, with a Reason for each that stays in float.

    Raises:
        OptionNameError, OptionValueError: a bad config.
        KernelBuildError: ``kernels="native"``, and there are none for the model's device.
        ModuleError: the model is itself a linear or a module of experts, which cannot be replaced in place.
    """
    options = Int8Config.make(config)
    model = _unwrapped(model, "quantize_")
    if is_float_linear(model) or is_experts(model):
        kind = Int8Experts if is_experts(model) else Int8Linear
        raise ModuleError(
            f"quantize_(model): model is itself a {type(model).__name__}, which nothing holds that could hold another; "
            f"use int8compile.{kind.__name__}.from_float(model)"
        )
    refused = _refused_by_transformers(model, options)
    found, experts = find_linears(model, options, refused=refused), find_experts(model, options, refused=refused)
    provider = _provider(model, options)
    report = Report([_graph_report(found, experts, provider, options)])
    todo = deque(f for f in found if f.site.reason is Reason.REWRITTEN)
    more = deque(f for f in experts if f.chosen)
    del found, experts  # the queues alone must hold the float modules, which are let go one by one
    _convert(model, todo, options)
    convert_experts(model, more, options)
    if (integration := _transformers_integration(model)) is not None:
        integration.attach_(model, options, refused)
    return report


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Turn every ``Int8Linear`` and ``Int8Experts`` back into the kind of float module it was, in place.

    The originals are gone: each weight comes back within half a step of its channel's scale.

    Args:
        dtype: of the new weights and biases; by default that of the weights that were quantised.

    Returns:
        how many modules were converted.

    Raises:
        ModuleError: ``dtype`` is no float's, the model is itself an ``Int8Linear`` or an ``Int8Experts``, or a part of
            it is offloaded.
    """
    model = _unwrapped(model, "dequantize_")
    if isinstance(model, (Int8Linear, Int8Experts)):
        raise ModuleError(f"dequantize_(model): model is itself an {type(model).__name__}; use model.to_float()")
    if dtype is not None and not dtype.is_floating_point:
        raise ModuleError(f"dequantize_(model, dtype={dtype}): expected a floating-point dtype")
    shared: dict[int, nn.Parameter] = {}
    modules = by_identity(model, (Int8Linear, Int8MasterLinear, Int8Experts))
    offloaded = next((paths[0] for module, paths in modules if is_offloaded(module)), None)
    if offloaded is not None:
        raise ModuleError(f"dequantize_(model): {offloaded} is offloaded by accelerate; load the model without offload")
    for module, paths in modules:
        assert isinstance(module, (Int8Linear, Int8MasterLinear, Int8Experts))
        keys = {name: id(getattr(module, name)) for name in getattr(module, "int8", ("weight",))}
        new: nn.Module = module.to_float(dtype)
        for name, key in keys.items():  # modules that shared an int8 weight share the float one
            new.register_parameter(name, shared.setdefault(key, getattr(new, name)))
        replace(model, paths, module, new)
    return len(modules)


def find_linears(
    model: nn.Module, config: Int8Config, *, refused: Mapping[str, tuple[Reason, str]] | None = None
) -> list[Found]:
    """Every linear of a model once, with what becomes of it under a config.

    Args:
        refused: Reasons known to the caller, by module path.
    """
    facts = _Facts(model, config, refused or {})
    return [
        Found(module, paths, facts.site(module, paths))
        for module, paths in by_identity(model, (nn.Module,))
        if isinstance(module, Int8Linear) or is_float_linear(module)
    ]


def report_of(model: nn.Module, config: Int8Config, refused: Mapping[str, tuple[Reason, str]] | None = None) -> Report:
    """A model as it is: what of it is int8, and why the rest is not. ``refused`` as in ``find_linears``."""

    def as_is(site: Site) -> Site:
        if site.reason is not Reason.REWRITTEN:
            return site
        # By the rules it could be, but nobody did.
        return dataclasses.replace(site, reason=Reason.SKIPPED, detail="float in the checkpoint")

    linears = [dataclasses.replace(f, site=as_is(f.site)) for f in find_linears(model, config, refused=refused)]
    experts = [
        dataclasses.replace(f, sites={name: as_is(site) for name, site in f.sites.items()})
        for f in find_experts(model, config, refused=refused)
    ]
    return Report([_graph_report(linears, experts, _provider(model, config), config)])


def skeleton_(model: nn.Module, config: Int8Config, refused: Mapping[str, tuple[Reason, str]]) -> None:
    """Replace linears and experts on the meta device by empty int8 modules, to be filled from a checkpoint."""
    convert_experts(model, deque(f for f in find_experts(model, config, refused=refused) if f.chosen), config)
    for linear in find_linears(model, config, refused=refused):
        if linear.site.reason is Reason.REWRITTEN:
            if config.llm_int8_has_fp16_weight:
                new: nn.Module = Int8MasterLinear.from_float(linear.module, config)
            else:
                new = Int8Linear.from_float(linear.module, config, paths=linear.paths)
            replace(model, linear.paths, linear.module, new)


def _convert(model: nn.Module, linears: deque[Found], config: Int8Config) -> None:
    """Replace the linears found in a model by their int8 forms, one by one; empties the queue."""
    readers = Counter(id(f.module.weight) for f in linears)
    shared: dict[int, Int8Weight] = {}
    while linears:
        module, paths = linears[0].module, linears.popleft().paths
        if config.llm_int8_has_fp16_weight:
            replace(model, paths, module, Int8MasterLinear.from_float(module, config))
            continue
        key = id(module.weight)
        int8_weight = shared.get(key)
        if int8_weight is None:
            assert isinstance(module.weight, torch.Tensor)
            int8_weight = Int8Weight.quantize(module.weight, is_conv1d(module))
            if readers[key] > 1:
                shared[key] = int8_weight
        replace(model, paths, module, Int8Linear.from_float(module, config, paths=paths, int8_weight=int8_weight))


class _Facts:
    """What decides about a linear beside the linear itself."""

    def __init__(self, model: nn.Module, config: Int8Config, refused: Mapping[str, tuple[Reason, str]]) -> None:
        self.config, self.refused = config, refused
        self.fused = {id(child) for m in model.modules() if isinstance(m, _FUSED_PARENTS) for child in m.children()}
        self.embeddings = {_storage(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        self.routers = routers(model)
        get_output = getattr(model, "get_output_embeddings", None)
        self.output = id(get_output()) if callable(get_output) else None

    def site(self, module: nn.Module, paths: tuple[str, ...]) -> Site:
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        n, k = matrix_shape(module)
        if isinstance(module, Int8Linear):
            columns = selection.calibrated_columns(len(module._columns)) if module._columns else ""
            detail = selection.detail(module.outlier_policy, columns)
            reason, dtype = Reason.PREQUANTIZED, module.float_dtype
        elif isinstance(module, Int8MasterLinear) and self.config.llm_int8_has_fp16_weight:
            reason, detail, dtype = Reason.PREQUANTIZED, "16-bit weight", weight.dtype
        else:
            (reason, detail), dtype = self._reason(module, weight, paths, k, n), weight.dtype
            if reason is Reason.REWRITTEN:
                detail = selection.treatment(self.config, k, n, paths).note
        return Site(paths[0], k, n, str(dtype).removeprefix("torch."), reason, detail)

    def _reason(
        self, module: nn.Module, weight: torch.Tensor, paths: tuple[str, ...], k: int, n: int
    ) -> tuple[Reason, str]:
        by_caller = (self.refused[path] for path in paths if path in self.refused)
        is_output = id(module) == self.output or _storage(weight) in self.embeddings
        by_name = (selection.name_refusal(path, is_output, self.config) for path in paths)
        return (
            _module_refusal(module, weight)
            or ((Reason.FUSED, "") if id(module) in self.fused else None)
            or selection.shape_refusal(tuple(weight.shape), k)
            or selection.dtype_refusal(weight.dtype)
            or ((Reason.CUSTOM, "Conv1D") if self.config.llm_int8_has_fp16_weight and is_conv1d(module) else None)
            or next(by_caller, None)
            or next(filter(None, by_name), None)
            or ((Reason.ROUTER, "") if id(module) in self.routers else None)
            or selection.size_refusal(k, n, self.config)
            or selection.calibration_refusal(self.config, k, n, paths)
            or ((Reason.CUSTOM, "offloaded by accelerate") if is_offloaded(module) else None)
            or (Reason.REWRITTEN, "")
        )


def _module_refusal(module: nn.Module, weight: torch.Tensor) -> tuple[Reason, str] | None:
    if "weight" not in dict(module.named_parameters(recurse=False, remove_duplicate=False)):
        return Reason.NOT_CONSTANT, "parametrized"
    own_forward = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    replaced_forward = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # which is accelerate's doing
    if replaced_forward or (own_forward and type(module).__name__ not in _KNOWN_LINEARS):
        return Reason.CUSTOM, type(module).__name__
    if type(weight) not in selection.PLAIN_TENSORS:
        return Reason.SUBCLASS, type(weight).__name__
    return None


def is_float_linear(module: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` or a ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """N and K of a linear of any kind."""
    assert isinstance(module.weight, torch.Tensor)
    first, second = module.weight.shape
    return (second, first) if is_conv1d(module) else (first, second)


def _storage(tensor: object) -> int | None:
    return storage_key(tensor) if isinstance(tensor, torch.Tensor) else None


def _unwrapped(model: object, function: str) -> nn.Module:
    """The module itself, where ``torch.compile`` has wrapped it."""
    model = uncompiled(model)
    if not isinstance(model, nn.Module):
        raise ModuleError(f"{function}(model): model is {type(model).__name__}; expected a torch.nn.Module")
    return model


def _transformers_integration(model: nn.Module) -> Any:
    """Our part for transformers, if this is a model of its: one that has to know that it is int8.

    It would be saved as a float one with strange weights otherwise.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    return transformers_integration()


def _refused_by_transformers(model: nn.Module, config: Int8Config) -> dict[str, tuple[Reason, str]]:
    """What from_pretrained leaves in float for transformers' sake; a tied output embedding is taken on request."""
    integration = _transformers_integration(model)
    refused = integration.refused_linears(model, model.dtype) if integration is not None else {}

    def heeded(path: str, reason: Reason) -> bool:
        by_name = selection.weight_only_by(path, config) is not None
        return reason is not Reason.OUTPUT_EMBEDDING or (config.skip_output_embeddings and not by_name)

    return {path: why for path, why in refused.items() if heeded(path, why[0])}


def _provider(model: nn.Module, config: Int8Config) -> str:
    tensors = [p for p in model.parameters() if p.device.type != "meta"]
    return providers.choose_provider(config.kernels, tensors).name if tensors else "chosen at the first call"


def _use(found: Found, config: Int8Config) -> WeightUse:
    """Bytes of a linear's weight before and after."""
    weight, site = found.module.weight, found.site
    assert isinstance(weight, torch.Tensor)
    dtype = found.module.float_dtype if isinstance(found.module, Int8Linear) else weight.dtype
    in_int8 = site.rewritten and not config.llm_int8_has_fp16_weight
    int8_bytes = weight.numel() + 4 * site.out_features if in_int8 else 0
    return WeightUse(id(weight), weight.numel() * dtype.itemsize, int8_bytes, not in_int8)


def _graph_report(linears: list[Found], experts: list[FoundExperts], provider: str, config: Int8Config) -> GraphReport:
    sites = [f.site for f in linears] + [site for f in experts for site in f.sites.values()]
    uses = [_use(f, config) for f in linears] + [use for f in experts for use in f.uses()]
    name = config.calibration.name if config.calibration is not None else None
    return GraphReport("", provider, sites, uses, unmatched=selection.unmatched(config, sites), calibration=name)
