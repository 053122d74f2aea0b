"""Finds the weights [E, N, K] of a model's experts, and says of each what becomes of it under a config.

Each has a Site of its own, whose path is the weight's: ``model.layers.0.mlp.experts.down_proj``. A module of which one
weight is named by ``llm_int8_skip_modules``, or is too small, becomes int8 for the other one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter, deque
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from int8compile import selection
from int8compile.config import Int8Config
from int8compile.limits import FLOAT_DTYPES
from int8compile.modules.int8_experts import Int8Experts, is_experts, unknown, weight_names
from int8compile.modules.places import by_identity, is_offloaded, replace
from int8compile.report import Reason, Site, WeightUse
from int8compile.weights.int8_weight import Int8Weight


@dataclasses.dataclass(frozen=True)
class FoundExperts:
    """A module of experts: the module, every path it stands at, and the Site of each of its weights by name."""

    module: nn.Module
    paths: tuple[str, ...]
    sites: dict[str, Site]

    @property
    def chosen(self) -> list[str]:
        """The names of the weights that are to become int8."""
        return [name for name, site in self.sites.items() if site.reason is Reason.REWRITTEN]

    def uses(self) -> list[WeightUse]:
        """Bytes of each weight before and after."""
        return [_use(self.module, name, site) for name, site in self.sites.items()]


def find_experts(
    model: nn.Module, config: Int8Config, *, refused: Mapping[str, tuple[Reason, str]] | None = None
) -> list[FoundExperts]:
    """Every module of a model, once, that holds weights of several experts, whether its code is known or not.

    Args:
        refused: Reasons known to the caller, by the path of the module or of the weight.
    """
    found = []
    for module, paths in by_identity(model, (nn.Module,)):
        shapes = dict(_weights(module))
        if shapes:
            why = None if isinstance(module, Int8Experts) else unknown(module)
            sites = {n: _site(module, paths, n, shape, why, config, refused or {}) for n, shape in shapes.items()}
            found.append(FoundExperts(module, paths, sites))
    return found


def routers(model: nn.Module) -> set[int]:
    """Ids of the linears that choose among experts: beside them in a module, with a feature for each of them."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, Int8Experts) or is_experts(module):
            beside = model.get_submodule(path.rpartition(".")[0]).named_modules()
            # (A layer's other linears are called so, and may have as many features by chance.)
            linears = ((name, m) for name, m in beside if isinstance(m, nn.Linear) and not name.endswith("_proj"))
            found |= {id(linear) for _, linear in linears if linear.out_features == module.num_experts}
    return found


def convert_experts(model: nn.Module, experts: deque[FoundExperts], config: Int8Config) -> None:
    """Give the modules found their int8 weights, one by one; empties the queue, so that each float one can go."""
    readers = Counter(id(getattr(found.module, name)) for found in experts for name in found.chosen)
    shared: dict[int, Int8Weight] = {}
    while experts:
        found = experts.popleft()
        module, paths, names = found.module, found.paths, found.chosen
        del found
        keys = {name: id(getattr(module, name)) for name in names}
        known = {name: shared[key] for name, key in keys.items() if key in shared}
        if isinstance(module, Int8Experts):
            new = module
            for name in names:
                new.quantize_weight_(name, config, paths, known.get(name))
        else:
            new = Int8Experts.from_float(module, config, paths=paths, names=names, int8_weights=known)
            replace(model, paths, module, new)
        del module
        shared |= {key: new.int8_weight(name) for name, key in keys.items() if readers[key] > 1}


def _weights(module: nn.Module) -> Iterator[tuple[str, tuple[int, int, int]]]:
    """Names of a module's own weights of several matrices, and E, N and K of each."""
    if isinstance(module, Int8Experts):
        yield from ((name, module.shape_of(name)) for name in weight_names(module))
        return
    if any(base.__module__.startswith("torch.nn.modules.") for base in type(module).__mro__ if base is not nn.Module):
        return  # a convolution's weight, or what a parametrisation is computed from
    for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
        if weight.dim() == 3 and weight.shape[0] > 1 and weight.dtype in FLOAT_DTYPES:
            e, n, k = weight.shape if not getattr(module, "is_transposed", False) else weight.mT.shape
            yield name, (e, n, k)


def _site(
    module: nn.Module,
    paths: tuple[str, ...],
    name: str,
    shape: tuple[int, int, int],
    why: str | None,
    config: Int8Config,
    refused: Mapping[str, tuple[Reason, str]],
) -> Site:
    whole = [f"{path}.{name}" if path else name for path in paths]
    experts, n, k = shape
    if isinstance(module, Int8Experts) and name in module.int8:
        reason, detail = Reason.PREQUANTIZED, selection.detail(module.int8[name][1])
        dtype = module.float_dtype
    else:
        by_caller = (refused[path] for path in (*whole, *paths) if path in refused)
        by_name = (selection.name_refusal(path, False, config) for path in whole)
        reason, detail = (
            next(filter(None, by_name), None)
            or ((Reason.EXPERTS, why) if why is not None else None)
            or ((Reason.EXPERTS, "llm_int8_has_fp16_weight") if config.llm_int8_has_fp16_weight else None)
            or selection.shape_refusal((n, k), k)
            or next(by_caller, None)
            or selection.size_refusal(k, n, config)
            or ((Reason.CUSTOM, "offloaded by accelerate") if is_offloaded(module) else None)
            or (Reason.REWRITTEN, selection.detail(selection.outliers(config, *whole)[1]))
        )
        dtype = getattr(module, name).dtype
    return Site(whole[0], k, n, str(dtype).removeprefix("torch."), reason, detail, experts)


def _use(module: nn.Module, name: str, site: Site) -> WeightUse:
    weight = getattr(module, name)
    assert isinstance(weight, torch.Tensor)
    size = getattr(torch, site.dtype).itemsize
    int8_bytes = weight.numel() + 4 * weight.shape[0] * site.out_features if site.rewritten else 0
    return WeightUse(id(weight), weight.numel() * size, int8_bytes, not site.rewritten)
