"""PEFT: LoRA on int8 linears.

    import int8compile.integrations.peft

    model = get_peft_model(model, LoraConfig(...))

Importing this file teaches PEFT about ``Int8Linear``: ``get_peft_model`` and ``PeftModel.from_pretrained`` adapt it
like any linear, ``target_modules="all-linear"`` finds it, and merging goes by way of the float weight. What is named in
``modules_to_save`` trains as a float copy. Where PEFT has been imported before, loading an int8 transformers model
imports this file.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from int8compile.modules.inplace import dequantize_
from int8compile.modules.int8_experts import Int8Experts
from int8compile.modules.int8_linear import Int8Linear
from int8compile.modules.places import carry_hooks
from int8compile.weights.int8_weight import Int8Weight


class LoraInt8Linear(Linear):  # type: ignore[misc]
    """An ``Int8Linear`` with LoRA beside it: ``int8(x) + scaling * B(A(dropout(x)))``.

    Merging dequantises, adds and quantises again, which rounds; unmerging brings back the int8 weight that was there,
    to the bit, which is kept for it. Variants that look at the base weight (DoRA and the like) are refused.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # [N, K] whatever it was made of
        self._unmerged: tuple[Int8Weight, torch.Tensor | None] | None = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, Int8Linear)
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the int8 weight.

        Raises:
            ValueError: with ``safe_merge``, an adapter that is not finite. Nothing is merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        base = self.get_base_layer()
        weight = base.dequantize(torch.float32)
        bias = None if base.bias is None else base.bias.detach().clone()
        for name in names:
            weight += self.get_delta_weight(name).detach().to(weight)
            if self.lora_bias[name]:
                if bias is None:
                    raise RuntimeError(f"adapter {name!r} has a bias (lora_bias=True), and the base layer has none")
                bias += (self.lora_B[name].bias.detach() * self.scaling[name]).to(bias)
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaN or Inf in the weights merged with {', '.join(names)}; nothing was merged")
        if self._unmerged is None:
            before = None if base.bias is None else base.bias.detach().clone()
            self._unmerged = base.int8_weight, before
        base.int8_weight = Int8Weight.quantize(weight)
        if bias is not None:
            base.bias.data = bias
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Bring back the weight from before the first merge."""
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, (before, bias) = self.get_base_layer(), self._unmerged
        base.int8_weight = Int8Weight(*(tensor.to(base.weight.device) for tensor in before))
        if bias is not None:
            base.bias.data = bias.to(base.bias)
        self._unmerged = None
        self.merged_adapters.clear()


def _dispatch(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT asks its dispatchers in turn for an adapter layer; this one answers for ``Int8Linear``."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, Int8Linear):
        return LoraInt8Linear(target, adapter_name, config=config, **kwargs)
    answer: nn.Module | None = _dispatch_default(target, adapter_name, config=config, **kwargs)
    return answer


def _include_int8_linears(config: Any, model: nn.Module) -> Any:
    """What ``target_modules="all-linear"`` stands for, ``Int8Linear`` included."""
    given = getattr(config, "target_modules", None)
    config = _include_linears(config, model)
    if isinstance(given, str) and given.lower() == "all-linear":
        get_output = getattr(model, "get_output_embeddings", lambda: None)
        output = get_output()
        ours = {n for n, m in model.named_modules() if isinstance(m, Int8Linear) and m is not output}
        config.target_modules = set(config.target_modules) | ours
    return config


def _copy_in_float(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """``ModulesToSaveWrapper.update``: the copy that it makes is to train, and codes take no gradient."""
    known = adapter_name in self.modules_to_save
    _copy(self, adapter_name, *args, **kwargs)
    if known:
        return
    copied = self.modules_to_save[adapter_name]
    if isinstance(copied, (Int8Linear, Int8Experts)):
        self.modules_to_save[adapter_name] = copied.to_float()
        carry_hooks(copied, self.modules_to_save[adapter_name])
    elif not any(isinstance(module, (Int8Linear, Int8Experts)) for module in copied.modules()):
        return
    else:
        dequantize_(copied)
    self.modules_to_save[adapter_name].requires_grad_(adapter_name == self.active_adapter)


# These names are looked up where PEFT defines them each time it builds a model.
_dispatch_default = lora_model.dispatch_default
_include_linears = tuners_utils._maybe_include_all_linear_layers
_copy = ModulesToSaveWrapper.update
lora_model.dispatch_default = _dispatch
tuners_utils._maybe_include_all_linear_layers = _include_int8_linears
ModulesToSaveWrapper.update = _copy_in_float
