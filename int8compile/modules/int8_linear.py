"""``Int8Linear``: a linear that holds its weight in int8 and runs LLM.int8() wherever it is called.

In eager mode it calls the operator that the compiler pass would use. Under ``torch.compile`` with inductor it is one
call in the graph, without a break. ``backend="int8"`` treats that call as a site, so that several of them share one
quantised activation.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from int8compile.config import CALIBRATED, OUTLIER_POLICIES, WEIGHTS_ONLY, Int8Config
from int8compile.errors import OptionValueError
from int8compile.native import providers
from int8compile.ops import linear, master_linear
from int8compile.selection import treatment
from int8compile.weights.formats import SERIALIZED, read_int8_weight
from int8compile.weights.int8_weight import Int8Weight


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight; a drop-in for a trained ``nn.Linear`` at a quarter of fp32's memory.

    Not a subclass of ``nn.Linear``, so that nothing takes its codes for a float weight.

    Args:
        in_features, out_features: K and N.
        bias: whether there is one.
        threshold: magnitude from which an activation's features are multiplied in its own dtype; 0: none are.
        outlier_policy: ``"column"`` (the paper's rule) or ``"element"``; see ``Int8Config``. With ``"all"`` the
            activation is not quantised, and ``threshold`` is of no account.
        columns: features whose codes have 16 bits, in ascending order, whatever is in them; then the policy is
            ``"calibrated"``, and neither the other one nor ``threshold`` is of any account.
        kernels: ``"auto"``, ``"native"`` or ``"reference"``; see ``Int8Config``. Native kernels are loaded (and built)
            at the first call.
        dtype: of the bias, and what ``dequantize()`` gives unless told otherwise. Activations bring their own.

    Attributes:
        weight: buffer, int8 [N, K], row-major.
        weight_scale: buffer, float32 [N]. ``weight * weight_scale[:, None]`` is the float weight. It stays float32
            through ``.half()`` and ``.to(dtype)``, which move the bias alone.
        bias: Parameter [N], or None.
        float_dtype: dtype of the float weight it stands for.
        stored_transposed: whether it stands for a ``Conv1D``, whose float weight is [K, N].
        columns: int32 [C], or None. No state dict has them: which they are is a matter of the configuration.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        threshold: float = 6.0,
        outlier_policy: str = "column",
        columns: Sequence[int] = (),
        kernels: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = Int8Config(llm_int8_threshold=threshold, kernels=kernels)
        policies = (*OUTLIER_POLICIES, WEIGHTS_ONLY)
        if outlier_policy not in policies:
            raise OptionValueError("outlier_policy", outlier_policy, "one of " + ", ".join(map(repr, policies)))
        self.in_features, self.out_features = in_features, out_features
        self.threshold, self.outlier_policy, self.kernels = config.llm_int8_threshold, outlier_policy, kernels
        self._columns = _checked_columns(columns, in_features)
        self._columns_here: torch.Tensor | None = None
        if self._columns:
            self.threshold, self.outlier_policy = 0.0, CALIBRATED
        self.float_dtype = dtype or torch.get_default_dtype()
        self.float_type: type[nn.Module] = nn.Linear
        self.register_buffer("weight", torch.zeros((out_features, in_features), dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.zeros((out_features,), dtype=torch.float32, device=device))
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=self.float_dtype))
        self._place_columns()

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        config: Int8Config | None = None,
        *,
        paths: Sequence[str] = ("",),
        int8_weight: Int8Weight | None = None,
    ) -> Any:
        """The int8 form of an ``nn.Linear`` or of a GPT-2 ``Conv1D``, with the same bias Parameter.

        Args:
            paths: where the module stands in its model, for ``llm_int8_weight_only_modules``.
            int8_weight: the int8 form of its weight, if it is at hand.
        """
        config = config or Int8Config()
        weight, transposed = module.weight, is_conv1d(module)
        assert isinstance(weight, torch.Tensor)
        n, k = weight.shape[::-1] if transposed else weight.shape
        treated = treatment(config, k, n, paths)
        self = cls(
            k,
            n,
            bias=False,
            threshold=treated.threshold,
            outlier_policy="none" if treated.outlier_policy == CALIBRATED else treated.outlier_policy,
            columns=treated.columns,
            kernels=config.kernels,
            device="meta",
            dtype=weight.dtype,
        )
        self.float_type = type(module)
        self.bias = module.bias  # type: ignore[assignment]
        self.int8_weight = int8_weight or Int8Weight.quantize(weight, transposed)
        return self.train(module.training)

    @property
    def int8_weight(self) -> Int8Weight:
        """The int8 weight [N, K] and its scale [N]; another one is taken as it is, not copied."""
        return Int8Weight(self.weight, self.weight_scale)

    @int8_weight.setter
    def int8_weight(self, int8_weight: Int8Weight) -> None:
        self.weight, self.weight_scale = int8_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], in x's dtype (under autocast: in autocast's)."""
        load_kernels(self.kernels, self.weight.device.type)
        operands = (x, self.weight, self.weight_scale, self.bias, self.threshold, self.outlier_policy)
        out: torch.Tensor = linear(*operands, self.columns) if self._columns else linear(*operands)
        return out

    @property
    def columns(self) -> torch.Tensor | None:
        here = self._columns_here
        if here is None or here.device == self.weight.device:
            return here
        return self._columns_on(self.weight.device)  # some set tensors past ``__setattr__``

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._place_columns()

    def _place_columns(self) -> None:
        """Hold the columns where the weight is. (As a buffer they would be filled with anything while models load.)"""
        if getattr(self, "_columns", ()):
            self._columns_here = self._columns_on(self.weight.device)

    def _columns_on(self, device: torch.device) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.tensor(self._columns, dtype=torch.int32, device=device)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The float weight [N, K] that the codes stand for."""
        return self.int8_weight.dequantize(dtype or self.float_dtype)

    @property
    def stored_transposed(self) -> bool:
        return self.float_type.__name__ == "Conv1D"

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """An ``nn.Linear`` (or ``Conv1D``, where it was one) with the values that the codes stand for."""
        bias = self.bias
        if self.stored_transposed:
            with torch.device("meta"):
                module = self.float_type(self.out_features, self.in_features)
            weight = self.int8_weight.dequantize(dtype or self.float_dtype, transposed=True)
        else:
            module = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
            weight = self.dequantize(dtype)
        module.weight = nn.Parameter(weight)
        if bias is not None and dtype is not None and bias.dtype != dtype:
            bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
        module.bias = bias
        return module.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={self.threshold:g}, outlier_policy={self.outlier_policy!r}"
            + (f", columns={len(self._columns)}" if self._columns else "")
        )

    def hold_parameters_(self) -> None:
        """Keep codes and scales as Parameters that need no gradient: transformers shards those, and no buffers."""
        if self._columns:
            raise ValueError(
                f"a module {self.in_features} x {self.out_features} has the columns of a calibration, which belong to "
                "whole weights; expected modules that were quantised without one where weights are to be sharded"
            )
        for name in ("weight", "weight_scale"):
            tensor = getattr(self, name)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self._hf_quantized_needs_local_tp = True  # transformers calls the module on its shard, with plain tensors

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves, casts and shares as every module does, but codes and scales keep their dtypes."""
        if "weight_scale" in self._parameters:  # which a cast would change in place
            weight_scale = self.weight_scale
            del self._parameters["weight_scale"]
            super()._apply(fn, recurse)
            moved = weight_scale.to(self.weight.device)
            self.register_parameter("weight_scale", nn.Parameter(moved, requires_grad=False))
            self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
            return self
        codes, weight_scale = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        # What a cast makes of a float weight shows on an empty one.
        self.float_dtype = fn(torch.empty(0, dtype=self.float_dtype)).dtype
        if self.weight.dtype != codes.dtype:
            self.weight = codes.to(self.weight.device)
        if self.weight_scale.dtype != weight_scale.dtype:
            self.weight_scale = weight_scale.to(self.weight_scale.device)
        self._place_columns()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Takes bitsandbytes' keys too, and refuses what is not an int8 weight with its scale."""
        *_, error_messages = args
        entries = {n: state_dict.pop(prefix + n) for n in SERIALIZED if prefix + n in state_dict}
        try:
            int8_weight = read_int8_weight(entries, prefix, self.weight.shape)
        except ValueError as error:
            error_messages.append(str(error))
            return
        if int8_weight is not None:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = int8_weight
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._place_columns()


def _checked_columns(columns: Sequence[int], in_features: int) -> tuple[int, ...]:
    made = tuple(map(int, columns))
    if any(a >= b for a, b in itertools.pairwise(made)) or not all(0 <= c < in_features for c in made):
        raise OptionValueError("columns", list(made), f"features below {in_features}, in ascending order")
    return made


class Int8MasterLinear(nn.Linear):
    """A linear that trains in float and multiplies in int8 (``llm_int8_has_fp16_weight=True``).

    Its weight is an ordinary Parameter (so are its state dict and its gradients), quantised anew at each call; outlier
    features are multiplied with the weight itself. Training and evaluation compute the same function.
    """

    threshold: float
    outlier_policy: str
    kernels: str

    @classmethod
    def from_float(cls, module: nn.Module, config: Int8Config) -> Int8MasterLinear:
        """With the Parameters of an ``nn.Linear``; they are not copied."""
        assert isinstance(module.weight, nn.Parameter)
        n, k = module.weight.shape
        self = cls(k, n, bias=module.bias is not None, device="meta")
        self.weight, self.bias = module.weight, module.bias  # type: ignore[assignment]
        self.threshold, self.outlier_policy = config.llm_int8_threshold, config.outlier_policy
        self.kernels = config.kernels
        return self.train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] to [..., N], in x's dtype (under autocast: in autocast's)."""
        load_kernels(self.kernels, self.weight.device.type)
        out: torch.Tensor = master_linear(x, self.weight, self.bias, self.threshold, self.outlier_policy)
        return out

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """An ``nn.Linear`` with the same Parameters, cast if need be."""
        module = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        module.weight, module.bias = self.weight, self.bias
        return module.to(dtype).train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, threshold={self.threshold:g}, outlier_policy={self.outlier_policy!r}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' ``Conv1D``, a linear whose weight is [K, N]; known without importing it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def load_kernels(kernels: str, device: str) -> bool:
    """Load native kernels for a device once; while Dynamo traces, at once rather than in the graph."""
    return _load_kernels(kernels, device)


@functools.cache
def _load_kernels(kernels: str, device: str) -> bool:
    return device != "meta" and providers.choose_provider(kernels, [torch.empty(0, device=device)]).native
