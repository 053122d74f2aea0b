"""``Int8Experts``: the experts of one layer of a mixture, with their weights in int8; ``Int8Linear``'s sibling.

transformers keeps a layer's experts in one module with bare Parameters [E, N, K] (or [E, K, N]), and computes it in one
of several ways that it holds to be the same ("grouped_mm", "batched_mm", a loop). ``Int8Experts`` takes the place of
such a module, has its attributes and the same names in its state dict, and computes it in one way: rows sorted by
expert, an ``int8compile.grouped_linear`` for each weight. It has no break and no shape that depends on values, so that
prompts and decoding compile with ``fullgraph=True``.

What is between the two products (the gate, its limits, a norm) stays the float module's own code. A module whose code
is not known to be one of transformers' experts is not taken: see ``unknown``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from int8compile.config import Int8Config
from int8compile.modules.int8_linear import load_kernels
from int8compile.ops import grouped_linear
from int8compile.selection import PLAIN_TENSORS, outliers
from int8compile.torch_internals.modules import copy_contents
from int8compile.weights.formats import SCALE, read_experts_weight
from int8compile.weights.int8_weight import Int8Weight

#: ways to compute a module of experts that transformers holds to be the same
_IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")

#: what a module of experts says of itself
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel")


class Int8Experts(nn.Module):
    """Experts with int8 weights, made by ``from_float``; not a subclass of what it replaces, whose weights are floats.

    Attributes:
        gate_up_proj (up_proj where there is no gate), down_proj: buffers, int8 [E, N, K], whatever the order of the
            float weights is; one that stays in float is the Parameter that it was.
        gate_up_proj_scale, down_proj_scale: buffers, float32 [E, N], through ``.half()`` and ``.to(dtype)`` too.
        gate_up_proj_bias, down_proj_bias: Parameters [E, N], if there are any.
        int8: of each weight that is int8, the threshold and the outlier policy.
        float_dtype: dtype of the float weights; activations are cast to it, as transformers casts them.
        float_type: the class of the float module.
    """

    int8: dict[str, tuple[float, str]]
    kernels: str
    float_dtype: torch.dtype
    float_type: Any
    num_experts: int
    is_transposed: bool

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        config: Int8Config | None = None,
        *,
        paths: Sequence[str] = ("",),
        names: Collection[str] | None = None,
        int8_weights: Mapping[str, Int8Weight] | None = None,
    ) -> Int8Experts:
        """The int8 form of a module of experts, with the same biases, children and attributes.

        Args:
            paths: where the module stands in its model, for ``llm_int8_weight_only_modules``.
            names: which of its weights become int8; by default both.
            int8_weights: int8 forms that are at hand, by name.

        Raises:
            TypeError: what the module computes is not known.
        """
        if (why := unknown(module)) is not None:
            raise TypeError(f"Int8Experts.from_float(module): {type(module).__name__} cannot be taken: {why}")
        config, both = config or Int8Config(), weight_names(module)
        self = cls()
        copy_contents(module, self, without=())
        self.int8, self.kernels = {}, config.kernels
        self.float_type, self.float_dtype = type(module), getattr(module, both[0]).dtype
        for name in both if names is None else names:
            self.quantize_weight_(name, config, paths, (int8_weights or {}).get(name))
        return self.train(module.training)

    def quantize_weight_(
        self, name: str, config: Int8Config, paths: Sequence[str] = ("",), int8_weight: Int8Weight | None = None
    ) -> None:
        """Make the weight of that name, which is float, int8. Arguments as in ``from_float``."""
        int8_weight = int8_weight or Int8Weight.quantize(getattr(self, name), self.is_transposed)
        delattr(self, name)
        self.int8[name] = outliers(config, *(f"{path}.{name}" for path in paths))
        self.set_int8_weight(name, int8_weight)

    def dequantize_weight_(self, name: str) -> None:
        """Make the weight of that name, which is int8, a float Parameter with the values that its codes stand for."""
        weight = self.dequantize(name)
        delattr(self, name)
        delattr(self, name + SCALE)
        del self.int8[name]
        self.register_parameter(name, nn.Parameter(weight))

    def int8_weight(self, name: str) -> Int8Weight:
        """The int8 weight [E, N, K] of that name and its scale [E, N]."""
        return Int8Weight(getattr(self, name), getattr(self, name + SCALE))

    def set_int8_weight(self, name: str, int8_weight: Int8Weight) -> None:
        """Give one of the int8 weights another value, which is taken as it is, not copied."""
        self.register_buffer(name, int8_weight.weight)
        self.register_buffer(name + SCALE, int8_weight.weight_scale)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What each token's experts compute of it, weighted and summed.

        Args:
            hidden_states: [T, H].
            top_k_index: whole numbers [T, top_k]; one past the last expert (expert parallelism has such) adds nothing.
            top_k_weights: [T, top_k].

        Returns:
            [T, H], in the dtype of ``hidden_states``.
        """
        load_kernels(self.kernels, hidden_states.device.type)
        tokens, active = top_k_index.shape
        by_expert, order = top_k_index.reshape(-1).sort()
        experts = torch.arange(self.num_experts, dtype=by_expert.dtype, device=by_expert.device)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)

        first, second = weight_names(self)
        inner = self._product(first, hidden_states[order // active], by_expert, ends)
        inner = self.float_type._apply_gate(self, inner) if self.has_gate else self.act_fn(inner)  # type: ignore[operator]
        out = self._product(second, inner, by_expert, ends)
        if self.has_post_expert_norm:
            out = self.post_expert_norm(out)  # type: ignore[operator]

        weights = top_k_weights.reshape(-1)[order].unsqueeze(-1)
        if self._is_expert_parallel:
            weights = weights.masked_fill((by_expert >= self.num_experts).unsqueeze(-1), 0)
        places = torch.arange(order.shape[0], device=order.device)
        back = torch.empty_like(order).scatter_(0, order, places)
        weighted = (out * weights)[back].view(tokens, active, out.shape[-1])
        return weighted.sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: torch.Tensor, by_expert: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows [S, K], sorted by expert, times the weight of that name, plus its bias: [S, N]."""
        weight, bias = getattr(self, name), getattr(self, f"{name}_bias", None)
        if name in self.int8:
            scale, (threshold, outlier_policy) = getattr(self, name + SCALE), self.int8[name]
            rows = x.to(self.float_dtype)
            out: torch.Tensor = grouped_linear(rows, weight, scale, ends, bias, threshold, outlier_policy)
            return out
        biases = None if bias is None else bias[by_expert.clamp(max=self.num_experts - 1)]
        float_linear = _transformers_moe()._grouped_linear
        out = float_linear(x, weight, ends, bias=biases, is_transposed=self.is_transposed)
        # transformers' product leaves what it finds in rows of no expert.
        return out.masked_fill((by_expert >= self.num_experts).unsqueeze(-1), 0) if self._is_expert_parallel else out

    def shape_of(self, name: str) -> tuple[int, int, int]:
        """E, N and K of the weight of that name, which may be float."""
        weight = getattr(self, name)
        e, n, k = weight.mT.shape if self.is_transposed and name not in self.int8 else weight.shape
        return e, n, k

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight that the codes of that name stand for, in the order of the float module's."""
        return self.int8_weight(name).dequantize(dtype or self.float_dtype, self.is_transposed)

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A module of the class that it was, with the values that the codes stand for."""
        module: nn.Module = self.float_type.__new__(self.float_type)
        nn.Module.__init__(module)
        copy_contents(self, module, without=[*self.int8, *(name + SCALE for name in self.int8), *_OUR_OWN])
        for name, parameter in list(module.named_parameters(recurse=False)):
            if dtype is not None and parameter.dtype != dtype:
                cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                module.register_parameter(name, cast)
        for name in self.int8:
            module.register_parameter(name, nn.Parameter(self.dequantize(name, dtype)))
        return module.train(self.training)

    def extra_repr(self) -> str:
        shapes = [f"{name}={list(getattr(self, name).shape)}" for name in weight_names(self)]
        return ", ".join([f"{self.float_type.__name__}", *shapes, *(f"{n}: {o}" for n, o in self.int8.items())])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves, casts and shares as every module does, but codes and scales keep their dtypes."""
        before = {name: self.int8_weight(name) for name in self.int8}
        super()._apply(fn, recurse)
        # What a cast makes of a float weight shows on an empty one.
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        for name, int8_weight in before.items():
            for entry, old in zip((name, name + SCALE), int8_weight, strict=True):
                if (now := getattr(self, entry)).dtype != old.dtype:
                    self.register_buffer(entry, old.to(now.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Refuses what is not an int8 weight with its scale."""
        *_, error_messages = args
        for name in self.int8:
            key = prefix + name
            try:
                given = state_dict.get(key), state_dict.get(key + SCALE)
                int8_weight = read_experts_weight(*given, key, getattr(self, name).shape)
            except ValueError as error:
                error_messages.append(str(error))
                return
            if int8_weight is not None:
                state_dict[key], state_dict[key + SCALE] = int8_weight
        super()._load_from_state_dict(state_dict, prefix, *args)


#: attributes that the float module does not have
_OUR_OWN = ("int8", "kernels", "float_type", "float_dtype")


def weight_names(module: nn.Module) -> tuple[str, str]:
    """The names of the two weights of a module of experts."""
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def is_experts(module: nn.Module) -> bool:
    """Whether a module is a float one whose computation is known to be that of transformers' experts."""
    return not isinstance(module, Int8Experts) and unknown(module) is None


def unknown(module: nn.Module) -> str | None:
    """What about a module is not as in transformers' experts, so that it must stay as it is; None if all is known."""
    moe = _transformers_moe()
    if moe is None or not hasattr(moe, "_grouped_linear") or not hasattr(moe, "ALL_EXPERTS_FUNCTIONS"):
        return "no transformers with experts"
    if _interface(type(module).forward) is not moe.ALL_EXPERTS_FUNCTIONS or _own_forward(module):
        return "a forward of its own"
    flags = {flag: getattr(module, flag, None) for flag in _FLAGS}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        return f"flags {flags}"
    if name := _of_its_class(module):
        return f"a gate that needs {name} of its class"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in _IMPLEMENTATIONS:
        return f"experts_implementation={implementation!r}"
    return _wrong_weight(module, bool(flags["is_transposed"]), bool(flags["has_bias"]))


def _wrong_weight(module: nn.Module, transposed: bool, has_bias: bool) -> str | None:
    parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    experts, dtypes = getattr(module, "num_experts", None), set()
    for name in weight_names(module):
        weight, bias = parameters.get(name), getattr(module, f"{name}_bias", None)
        if weight is None or type(weight) not in PLAIN_TENSORS or weight.dim() != 3 or weight.shape[0] != experts:
            return f"{name} is no Parameter [{experts}, N, K]"
        n = weight.shape[2 if transposed else 1]
        if (bias is not None) != has_bias or (bias is not None and tuple(bias.shape) != (experts, n)):
            return f"{name}_bias is not [{experts}, {n}]"
        dtypes.add(weight.dtype)
    return None if len(dtypes) == 1 else "weights of two dtypes"


def _own_forward(module: nn.Module) -> bool:
    return "forward" in vars(module) and not hasattr(module, "_hf_hook")  # which is accelerate's doing


def _of_its_class(module: nn.Module) -> str | None:
    """A name that the gate's code may mean by ``self``'s and that ``Int8Experts`` does not have; or None."""
    gate = getattr(type(module), "_apply_gate", None) if module.has_gate else None
    names = getattr(getattr(gate, "__code__", None), "co_names", ())
    missing = (n for n in names if hasattr(type(module), n) and not hasattr(Int8Experts, n))
    return "_apply_gate" if "_apply_gate" in vars(module) else next(missing, None)


def _interface(forward: Any) -> object:
    """The table of functions that transformers' decorator of experts has put into a class's forward."""
    names = getattr(getattr(forward, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(forward, "__closure__", None) or (), strict=True))
    return cells["experts_interface"].cell_contents if "experts_interface" in cells else None


def _transformers_moe() -> Any:
    return sys.modules.get("transformers.integrations.moe")
