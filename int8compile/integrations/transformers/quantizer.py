"""transformers: load, quantise while loading, save and dequantise, as with its other quantisation methods.

    from int8compile.integrations.transformers import Int8Config

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=Int8Config())
    model.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)

Importing this file registers the method ``"int8compile"``. A process that loads a saved int8 model must import it
first; without it transformers fails on the checkpoint's first int8 weight, by its shape (see ``formats.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import int8compile
from int8compile import config as core
from int8compile.errors import OptionNameError, OptionValueError
from int8compile.integrations.transformers import bitsandbytes
from int8compile.integrations.transformers.after_loading import check_offload, check_whole, initialize_missing
from int8compile.integrations.transformers.experts import (
    conversions_for_loading,
    conversions_for_quantizing,
    conversions_for_saving,
    int8_weights,
)
from int8compile.integrations.transformers.loading import Deserialize, Quantize, Reading, untie_
from int8compile.integrations.transformers.parallel import is_tensor_parallel, refused_experts, replicate_scales
from int8compile.integrations.transformers.saving import (
    ignored,
    linear_paths,
    quantization_config,
    saved_as_float,
    state_dict,
)
from int8compile.modules.inplace import dequantize_, find_linears, report_of, skeleton_
from int8compile.modules.int8_experts import Int8Experts, is_experts
from int8compile.modules.int8_linear import Int8Linear, Int8MasterLinear
from int8compile.modules.places import carry_hooks
from int8compile.report import UNMATCHED, Reason, Report
from int8compile.selection import weight_only_by
from int8compile.weights.formats import FORMATS

log = logging.getLogger(__name__)

_FIELDS = (
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "llm_int8_weight_only_modules",
    "llm_int8_has_fp16_weight",
    "llm_int8_enable_fp32_cpu_offload",
    "activation",
    "outlier_policy",
    "calibration",
    "min_features",
    "skip_output_embeddings",
    "kernels",
)
_WRITTEN = {"quant_method", "version", "requires"}  # what to_dict adds


@register_quantization_config("int8compile")
class Int8Config(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` for ``from_pretrained``: the fields of ``int8compile.Int8Config`` that outlive a compile.

    Args:
        llm_int8_threshold, llm_int8_skip_modules, llm_int8_weight_only_modules, activation, outlier_policy,
        calibration, min_features, skip_output_embeddings, kernels, llm_int8_has_fp16_weight: as there.
            ``skip_output_embeddings=False`` takes output embeddings that are not tied; what transformers keeps tied
            stays float. A tied one that ``llm_int8_weight_only_modules`` names becomes an int8 copy, a byte an element,
            beside the float embedding.
        llm_int8_enable_fp32_cpu_offload: lets ``device_map`` put modules on the CPU or the disk beside a GPU. They are
            int8 there as well (bitsandbytes leaves them in float32); pass ``offload_buffers=True`` to from_pretrained.

    Raises:
        OptionNameError, OptionValueError: an unknown option, or one with a bad value.
    """

    quant_method = "int8compile"

    def __init__(self, **options: Any) -> None:
        options = {name: value for name, value in options.items() if name not in _WRITTEN}
        for name in options:
            if name not in _FIELDS:
                raise OptionNameError(name, _FIELDS)
        checked = core.Int8Config(**options)
        self.quant_method = "int8compile"
        for name in _FIELDS:
            value = getattr(checked, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)

    @classmethod
    def from_core(cls, config: object) -> Int8Config:
        """From all that ``int8compile.Int8Config.make`` takes, a ``BitsAndBytesConfig`` for one."""
        made = core.Int8Config.make(config)
        return cls(**{name: getattr(made, name) for name in _FIELDS})

    def to_core(self) -> core.Int8Config:
        """The same options for ``quantize_`` and ``torch.compile(..., backend="int8", options=...)``."""
        return core.Int8Config(**{name: getattr(self, name) for name in _FIELDS})

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return {
            "quant_method": "int8compile",
            "version": int8compile.__version__,
            "requires": "import int8compile.integrations.transformers",
            **{name: getattr(self, name) for name in _FIELDS if name != "calibration"},
            # (As what it says: a path would mean nothing where the checkpoint goes.)
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
        }


@register_quantizer("int8compile")
class Int8Quantizer(HfQuantizer):  # type: ignore[misc]
    """What from_pretrained calls on its way; ``report`` says what became of each linear."""

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        if isinstance(quantization_config, (BitsAndBytesConfig, core.Int8Config)):
            quantization_config = Int8Config.from_core(quantization_config)
        super().__init__(quantization_config, **kwargs)
        self.config = quantization_config.to_core()
        self.report = Report()
        self.loaded: set[str] = set()
        self.refused: dict[str, tuple[Reason, str]] = {}
        self.dtype: torch.dtype | None = None
        self._saving = "int8compile"
        self._as_float: set[str] = set()

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that the model will have, which transformers says here alone."""
        self.dtype = dtype
        return dtype

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return bool(self.config.llm_int8_has_fp16_weight)

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("weights_only") is False:
            raise OptionValueError("weights_only", False, "True: pickled code is not run for the sake of weights")
        device_map = kwargs.get("device_map")
        devices = {str(d) for d in device_map.values()} if isinstance(device_map, dict) else set()
        slow = ", ".join(sorted(devices & {"cpu", "disk"}))
        if slow and len(devices) > 1 and not self.config.llm_int8_enable_fp32_cpu_offload:
            raise ValueError(
                f"device_map puts some modules on {slow}: if that is meant, set llm_int8_enable_fp32_cpu_offload=True "
                "in the Int8Config and pass offload_buffers=True to from_pretrained"
            )
        if "disk" in devices and not self.pre_quantized:
            # transformers would read what it offloads from the float file at each forward.
            raise ValueError(
                "device_map puts modules on the disk, which works from an int8 checkpoint only: save_pretrained the "
                "int8 model once, then load that"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized and is_tensor_parallel(model):
            raise ValueError(
                "an int8 checkpoint cannot be loaded under tensor parallelism: load the float one with "
                "quantization_config=Int8Config(), or compile the float model with backend='int8'"
            )
        self.refused = refused_linears(model, self.dtype)
        if is_tensor_parallel(model):
            self.refused |= refused_experts(model, self.config)
        skeleton_(model, self.config, self.refused)
        if is_tensor_parallel(model):
            for module in model.modules():
                if isinstance(module, Int8Linear):
                    module.hold_parameters_()

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        super().update_parallel_plan(model, plan)
        if is_tensor_parallel(model):
            replicate_scales(model, plan)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        module = model.get_submodule(path)
        is_int8 = name in module.int8 if isinstance(module, Int8Experts) else name == "weight"
        return not self.pre_quantized and is_int8 and isinstance(module, (Int8Linear, Int8Experts))

    def get_quantize_ops(self) -> Quantize:
        return Quantize(self.loaded)

    def get_load_operations(self) -> dict[str, Any]:
        return {"deserialize": lambda _: Deserialize(self.config, self.loaded)}

    serialized_names = {"weight": ["weight", "weight_scale", "SCB", "weight_format"]}  # noqa: RUF012

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The model's own conversions, and ours."""
        if self.pre_quantized:
            weight_conversions = conversions_for_loading(weight_conversions, model, self.config, self.loaded)
        else:
            weight_conversions = conversions_for_quantizing(weight_conversions, model, self.loaded)
        return list(super().update_weight_conversions(weight_conversions, model))

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Floats are cast to the model's dtype; what may be codes or scales, by ``Reading``, which sees which."""
        ours = [op for op in getattr(converter, "operations", ()) if isinstance(op, Reading)]
        for op in ours:
            op.dtype = dtype
        is_float = param.get_dtype() in ("F64", "F32", "F16", "BF16") if hasattr(param, "get_dtype") else True
        return dtype if is_float and not ours and dtype is not None and dtype.is_floating_point else None

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        initialize_missing(model, self.loaded)
        self._copy_tied(model)
        check_offload(model)
        check_whole(model)
        self.attach_(model)
        log.info("int8: %s", self.report.summary())
        if self.report.unmatched and not self.pre_quantized:
            log.warning("int8: %s: %s", UNMATCHED, ", ".join(self.report.unmatched))
        return model

    def _copy_tied(self, model: Any) -> None:
        """Give output embeddings that are to have int8 weights, and are tied to a float one, a copy of it in int8."""
        for found in find_linears(model, self.config, refused=heeded(self.refused, self.config)):
            tied = [path for path in found.paths if self.refused.get(path, (None,))[0] is Reason.OUTPUT_EMBEDDING]
            if not tied or found.site.reason is not Reason.REWRITTEN or found.module.weight.is_meta:  # type: ignore[union-attr]
                continue
            new = Int8Linear.from_float(found.module, self.config, paths=found.paths)
            carry_hooks(found.module, new)
            for path in found.paths:
                model.set_submodule(path, new)
                untie_(model, f"{path}.weight")
                self.refused.pop(path, None)

    def attach_(self, model: Any) -> None:
        """Make a model know that it is int8, as from_pretrained does."""
        model.hf_quantizer, model.config.quantization_config = self, self.quantization_config
        model.is_quantized, model.is_loaded_in_8bit = True, True
        model.quantization_method = "int8compile"
        # What we read in is not what we write: the state dict that is saved is made by get_state_dict_and_metadata.
        model._weight_conversions = conversions_for_saving(model)
        self.report = report_of(model, self.config, self.refused)
        _tell_peft()

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return state_dict(model, self._saving, self._as_float), {"int8compile": int8compile.__version__}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        # config.dtype, which transformers passes, is a name once the model has been saved.
        dequantize_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        model.is_loaded_in_8bit = False  # type: ignore[assignment]
        return model

    @contextlib.contextmanager
    def saving_as(self, model: Any, format: str) -> Iterator[None]:
        """Within the context ``model.save_pretrained`` writes another format."""
        before = model.config.quantization_config
        int8, left = linear_paths(model)
        as_float = saved_as_float(model, format)
        int8 = [path for path in int8 if path not in as_float]
        left += [path for path in sorted(as_float) if path not in {name for name, *_ in int8_weights(model)}]
        if format == "compressed-tensors":
            left = ignored(model, int8, left)
        written = quantization_config(before, int8, left, format)
        if as_float:
            names = ", ".join(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in as_float}))
            if not int8:
                raise OptionValueError("format", format, f"another one: to {format} {names} are float, all there are")
            log.warning("int8: written in float, which they are to %s: %s", format, names)
        conversions = model._weight_conversions
        self._saving, self._as_float, model.config.quantization_config = format, as_float, written
        model._weight_conversions = conversions_for_saving(model, single=format == "compressed-tensors")
        try:
            yield
        finally:
            self._saving, self._as_float, model.config.quantization_config = "int8compile", set(), before
            model._weight_conversions = conversions


def save_pretrained(model: Any, folder: str, format: str = "int8compile", **kwargs: Any) -> None:
    """``model.save_pretrained(folder, ...)`` in a format of choice.

    Args:
        format: ``"int8compile"``; ``"bitsandbytes"``, which bitsandbytes reads (a linear that it has no int8 form for,
            such as T5's ``wo``, and experts are written in float and named in a warning); ``"compressed-tensors"``,
            int8 weights with dynamic int8 activations a token, which vLLM and SGLang serve (they know no outliers).
            Linears of which the weights alone are int8 are written in float in either, with a warning; so are
            experts, of whom that format knows each one's linears, in a model whose checkpoints have others.
        kwargs: those of transformers' ``save_pretrained``.

    Raises:
        OptionValueError: an unknown format, one that cannot hold this model, or a model that was never made int8.
            Nothing is written.
    """
    if format not in FORMATS:
        raise OptionValueError("format", format, "one of " + ", ".join(map(repr, FORMATS)))
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Int8Quantizer):
        raise OptionValueError("model", type(model).__name__, "a model loaded with Int8Config or given to quantize_")
    conv1d = any(isinstance(m, Int8Linear) and m.stored_transposed for m in model.modules())
    if format == "compressed-tensors" and conv1d:
        raise OptionValueError("format", format, "another one for this model: that format knows no Conv1D")
    if format != "int8compile" and any(isinstance(m, Int8MasterLinear) for m in model.modules()):
        expected = "'int8compile' for a model whose weights are float (llm_int8_has_fp16_weight)"
        raise OptionValueError("format", format, expected)
    with quantizer.saving_as(model, format):
        model.save_pretrained(folder, **kwargs)


def take_over_bitsandbytes(enabled: bool = True) -> None:
    """Route ``BitsAndBytesConfig(load_in_8bit=True)`` and bitsandbytes' int8 checkpoints to this package.

    For the whole process, whether bitsandbytes is installed or not. Checkpoints are read as they are: no copy, no
    requantisation, and what is int8 in the file is int8 here. Where a float checkpoint is quantised while it is loaded,
    the rules are those of ``int8compile.Int8Config``: ``llm_int8_skip_modules`` adds to the defaults, and a name in it
    stands for no module that merely ends with it. As with bitsandbytes, a model goes to the current GPU if no
    ``device_map`` says otherwise.

    Args:
        enabled: False gives them back.
    """
    AUTO_QUANTIZER_MAPPING["bitsandbytes_8bit"] = _InPlaceOfBitsAndBytes if enabled else Bnb8BitHfQuantizer


class _InPlaceOfBitsAndBytes(Int8Quantizer):
    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map


def attach_(model: Any, config: core.Int8Config, refused: dict[str, tuple[Reason, str]]) -> None:
    """Tell a transformers model that ``quantize_`` has made it int8, so that it can be saved and trained as such.

    Args:
        refused: of ``refused_linears``, those that were heeded.
    """
    quantizer = Int8Quantizer(Int8Config.from_core(dataclasses.replace(config, inductor={}, mode=None)))
    quantizer.refused = refused
    quantizer.attach_(model)
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Int8Linear):
            untie_(model, f"{path}.weight")
    for name, *_ in int8_weights(model):
        untie_(model, name)


def _tell_peft() -> None:
    """Who has imported PEFT before the model was loaded need not import our part of it."""
    if "peft" in sys.modules:
        try:
            from int8compile.integrations import peft  # noqa: F401 (which registers it)
        except (ImportError, AttributeError) as error:
            log.info("int8: this peft cannot adapt Int8Linear (%s)", error)


def heeded(refused: dict[str, tuple[Reason, str]], config: core.Int8Config) -> dict[str, tuple[Reason, str]]:
    """Of ``refused_linears``, all but tied output embeddings that are to be copied as int8 weights."""
    return {
        path: why
        for path, why in refused.items()
        if why[0] is not Reason.OUTPUT_EMBEDDING or weight_only_by(path, config) is None
    }


def refused_linears(
    model: Any, dtype: torch.dtype | None, format: str = "int8compile"
) -> dict[str, tuple[Reason, str]]:
    """Linears that a transformers model cannot have in int8: tied ones, and those it keeps in float32 at this dtype.

    Those that a format cannot hold too, if it is another.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    keys = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    refused = dict.fromkeys(keys, (Reason.OUTPUT_EMBEDDING, "tied"))
    in_float32 = model._get_dtype_plan(dtype) if dtype is not None else {}
    linears = {f"{path}.weight" for path, _ in model.named_modules(remove_duplicate=False)}
    for name in linears | {name for name, _ in model.named_parameters(remove_duplicate=False)}:
        # As transformers looks for what it casts: "mlp.gate.weight" is one of these names.
        if any(re.search(pattern.replace("*", ".*"), name) for pattern in in_float32):
            refused[name.removesuffix(".weight")] = (Reason.SKIPPED, "_keep_in_fp32_modules")
    there = bitsandbytes.float_linears(model) if format == "bitsandbytes" else set()
    if format == "bitsandbytes":
        there |= {path for path, module in model.named_modules(remove_duplicate=False) if is_experts(module)}
    return dict.fromkeys(there, (Reason.SKIPPED, "float to bitsandbytes")) | refused
