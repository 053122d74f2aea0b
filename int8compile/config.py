"""Every option, as one dataclass, and every environment variable.

Names are those of ``transformers.BitsAndBytesConfig`` wherever it has one. No other file reads an ``INT8COMPILE_``
variable.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from int8compile.errors import OptionNameError, OptionValueError
from int8compile.hooks import calibration, transformers_integration
from int8compile.limits import SMALLEST_THRESHOLD

#: the passes in the order they run; ``passes/__init__.py`` makes its PIPELINE of them
PASS_NAMES = (
    "expand", "group_heads", "attend", "fold_queries", "normalize", "quantize", "experts", "merge", "share", "verify"
)  # fmt: skip
KERNELS = ("auto", "native", "reference")
ATTENTION = ("auto", "native", "torch")
OUTLIER_POLICIES = ("column", "element", "none")
#: the outlier policy of a linear whose weight alone is int8: every column is one
WEIGHTS_ONLY = "all"
#: that of a linear whose outlier columns a calibration names
CALIBRATED = "calibrated"
ACTIVATIONS = ("int8", "float")
MODES = ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class Int8Config:
    """Options of ``torch.compile(model, backend="int8", options={...})``.

    Args:
        llm_int8_threshold: features that reach this magnitude in any row are multiplied in the activation's own dtype
            (16 bits in the paper: LLM.int8(), section 3.2). 0 turns the decomposition off; anything else is at least
            2**-126. With infinity, infinite values alone are multiplied so.
        llm_int8_skip_modules: modules left in float, *added* to the defaults. Each is a module path, a
            dotted suffix of one, or a shell pattern; naming a parent skips everything below it. Experts' weights have
            paths of their own, such as ``model.layers.0.mlp.experts.down_proj``.
        llm_int8_weight_only_modules: modules whose weights alone are int8; their activations are not quantised, and the
            products are summed in fp32. Names as in ``llm_int8_skip_modules``, which wins over this list. It takes
            output embeddings that it names, too, whatever ``skip_output_embeddings`` says.
        llm_int8_has_fp16_weight: keep the weights as they are, so that they can train, and quantise them at each
            call; outlier features are multiplied with the true weights. Costs memory and time.
        llm_int8_enable_fp32_cpu_offload: accepted for compatibility; a compiled graph runs wherever its
            tensors are, so it changes nothing here.
        activation: ``"int8"`` quantises activations, which LLM.int8() is about. With ``"float"`` only weights are int8,
            in every linear: fewer bytes to read, the closest results, and no faster arithmetic for many rows.
        outlier_policy: ``"column"`` is the paper's rule, in which an outlier marks its feature for every row
            of the batch. ``"element"`` takes the outlier elements alone out of the int8 product, so that a row's
            result does not depend on the rows beside it (up to the order of fp32 summation). ``"none"`` quantises
            everything, as threshold 0 does.
        calibration: what ``int8compile.calibrate`` made, or the path of its file: which columns of each linear have
            16-bit codes, whatever is in them, and which linears stay in float. Nothing is looked for at run time, and a
            row's result has the same bits in any batch. A linear that it does not know keeps ``outlier_policy``.
        min_features: a linear with fewer input or output features stays in float. 0: nothing is too small.
            The default is where int8 stops paying; ``benchmarks/studies/min_features.py`` prints the figures.
        skip_output_embeddings: leave ``lm_head`` / ``embed_out`` and weights shared with an embedding in float.
        release_weights: free each float weight once its int8 form exists. The eager model, ``state_dict()`` and
            ``load_state_dict()`` then raise until ``int8compile.restore_weights_(model)``.
        kernels: ``"auto"`` takes native kernels where there are some and the reference otherwise,
            ``"native"`` insists on them, ``"reference"`` never builds anything.
        attention: what computes attention on CPUs, without gradients: ``"auto"`` takes ``int8compile::attention`` where
            it was measured to be faster than PyTorch's on this kind of CPU, ``"native"`` wherever it can be taken, and
            ``"torch"`` nowhere. Exported programs, which may run on another CPU, keep PyTorch's.
        disable_passes: names of passes to leave out, of expand, group_heads, attend, fold_queries, normalize, quantize,
            experts, merge, share, verify.
        mode: as ``torch.compile``'s own ``mode``, which cannot be given together with options.
        inductor: inductor's own options, passed on as they are.

    Raises:
        OptionValueError: a value of the wrong type or out of range.
    """

    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: tuple[str, ...] = ()
    llm_int8_weight_only_modules: tuple[str, ...] = ()
    llm_int8_has_fp16_weight: bool = False
    llm_int8_enable_fp32_cpu_offload: bool = False
    activation: str = "int8"
    outlier_policy: str = "column"
    calibration: Any = None
    min_features: int = 128
    skip_output_embeddings: bool = True
    release_weights: bool = False
    kernels: str = "auto"
    attention: str = "auto"
    disable_passes: tuple[str, ...] = ()
    mode: str | None = None
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        put("llm_int8_threshold", _threshold(self.llm_int8_threshold))
        put("llm_int8_skip_modules", _names("llm_int8_skip_modules", self.llm_int8_skip_modules))
        put("llm_int8_weight_only_modules", _names("llm_int8_weight_only_modules", self.llm_int8_weight_only_modules))
        put("disable_passes", _names("disable_passes", self.disable_passes))
        for name in (
            "llm_int8_has_fp16_weight",
            "llm_int8_enable_fp32_cpu_offload",
            "skip_output_embeddings",
            "release_weights",
        ):
            if not isinstance(getattr(self, name), bool):
                raise OptionValueError(name, getattr(self, name), "True or False")
        if isinstance(self.min_features, bool) or not isinstance(self.min_features, int) or self.min_features < 0:
            raise OptionValueError("min_features", self.min_features, "an integer >= 0")
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.outlier_policy == WEIGHTS_ONLY:
            expected = "'column', 'element' or 'none'; activation='float' is what leaves all activations as they are"
            raise OptionValueError("outlier_policy", WEIGHTS_ONLY, expected)
        if self.outlier_policy == CALIBRATED:
            expected = "'column', 'element' or 'none'; calibration=... is what names the columns of each linear"
            raise OptionValueError("outlier_policy", CALIBRATED, expected)
        if self.calibration is not None:
            put("calibration", calibration().Calibration.make(self.calibration))
        if self.calibration is not None and self.llm_int8_has_fp16_weight:
            expected = "None, as llm_int8_has_fp16_weight=True looks for outliers at each call"
            raise OptionValueError("calibration", self.calibration, expected)
        _one_of("outlier_policy", self.outlier_policy, OUTLIER_POLICIES)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("attention", self.attention, ATTENTION)
        if self.attention == "native" and self.kernels == "reference":
            raise OptionValueError("attention", "native", "'auto' or 'torch', as kernels='reference' builds no kernels")
        for name in self.disable_passes:
            if name not in PASS_NAMES:
                raise OptionValueError("disable_passes", name, "names among " + ", ".join(PASS_NAMES))
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if self.release_weights and self.llm_int8_has_fp16_weight:
            raise OptionValueError("release_weights", True, "False, as llm_int8_has_fp16_weight=True keeps the weights")
        if self.llm_int8_has_fp16_weight and (self.llm_int8_weight_only_modules or self.activation == "float"):
            name = "activation" if self.activation == "float" else "llm_int8_weight_only_modules"
            expected = "the default, as llm_int8_has_fp16_weight=True has no int8 weights (llm_int8_skip_modules leaves"
            raise OptionValueError(name, getattr(self, name), f"{expected} linears in float)")
        if not isinstance(self.inductor, Mapping):
            raise OptionValueError("inductor", self.inductor, "a dict of inductor's own options")

    @classmethod
    def make(cls, options: object = None, *, mode: str | None = None) -> Int8Config:
        """An ``Int8Config`` from what a user passed: None, a dict, an ``Int8Config`` or a ``BitsAndBytesConfig``.

        Raises:
            OptionNameError: a dict with an unknown key.
            OptionValueError: a value of the wrong type or range, or a 4-bit ``BitsAndBytesConfig``.
        """
        if isinstance(options, cls):
            config = options
        elif options is None:
            config = cls()
        elif isinstance(options, Mapping):
            known = [f.name for f in dataclasses.fields(cls)]
            for name in options:
                if name not in known:
                    raise OptionNameError(str(name), known)
            config = cls(**options)
        elif type(options).__name__ == "BitsAndBytesConfig":
            config = cls(**_from_bitsandbytes(options))
        else:
            raise OptionValueError("options", options, "a dict, an Int8Config or a BitsAndBytesConfig")
        if mode is None or mode == config.mode:
            return config
        if config.mode is not None:
            raise OptionValueError("mode", mode, f"the same as options['mode'], which is {config.mode!r}")
        return dataclasses.replace(config, mode=mode)

    @property
    def quant_method(self) -> str:
        """The name that transformers reads from a ``quantization_config``, so that it accepts this class there."""
        transformers_integration()  # registers what the name stands for
        return "int8compile"

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as JSON has them; transformers writes them down on its way to a model."""
        made = dataclasses.asdict(self)
        return made if self.calibration is None else {**made, "calibration": self.calibration.to_dict()}

    def fingerprint(self) -> str:
        """Stable text of our own options; part of the compile caches' key, where inductor's own are already."""
        return repr([(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "inductor"])


def _from_bitsandbytes(config: object) -> dict[str, Any]:
    """The fields of a ``BitsAndBytesConfig`` (taken by name, so transformers need not be installed)."""
    if getattr(config, "load_in_4bit", False):
        raise OptionValueError("load_in_4bit", True, "an 8-bit BitsAndBytesConfig (load_in_8bit=True)")
    fields: dict[str, Any] = {}
    for name in (f.name for f in dataclasses.fields(Int8Config) if f.name.startswith("llm_int8_")):
        if getattr(config, name, None) is not None:
            fields[name] = getattr(config, name)
    return fields


def _threshold(value: object) -> float:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        number = float(value) if real else math.nan  # type: ignore[arg-type]
    except OverflowError:  # an integer that no float holds
        number = math.inf if value > 0 else -math.inf  # type: ignore[operator]
    if not (value == 0 or number >= SMALLEST_THRESHOLD) or math.isnan(number):
        expected = "a real number >= 0: either 0, which turns outlier decomposition off, or at least 2**-126 (1.2e-38)"
        raise OptionValueError("llm_int8_threshold", value, expected)
    return abs(number)


def _names(option: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, (list, tuple, set, frozenset)):
        raise OptionValueError(option, value, f"a list of strings, such as [{str(value)!r}]")
    for name in value:
        if not isinstance(name, str) or not name:
            raise OptionValueError(option, value, f"a list of non-empty strings; it holds {name!r}")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)


def _one_of(option: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionValueError(option, value, "one of " + ", ".join(repr(a) for a in allowed))


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``INT8COMPILE_CACHE_DIR``, else ``int8compile`` in the user's cache folder.

    It may not be there, nor be a folder.

    Raises:
        FileNotFoundError: neither is set, and the user has no home folder.
    """
    ours = os.environ.get("INT8COMPILE_CACHE_DIR")
    if ours:
        return _without_tilde(Path(ours)).absolute()
    # As the XDG specification has it, a relative path is ignored; it would be another folder in every working folder.
    base = Path(os.environ.get("XDG_CACHE_HOME") or "")
    return (base if base.is_absolute() else _without_tilde(Path("~")) / ".cache") / "int8compile"


def _without_tilde(path: Path) -> Path:
    """An empty or relative ``HOME`` is none: the one is taken for ``/``, the other is elsewhere in every folder."""
    if not path.parts or not path.parts[0].startswith("~"):
        return path
    if path.parts[0] == "~" and os.name == "posix" and not os.path.isabs(os.environ.get("HOME", "/")):
        raise FileNotFoundError(f"there is no home folder for a cache: HOME is {os.environ['HOME']!r}")
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise FileNotFoundError("there is no home folder for a cache: HOME is not set") from error


def cpu_isa() -> str:
    """The set of CPU kernels that ``INT8COMPILE_CPU_ISA`` names; ``auto`` takes the best there is."""
    return os.environ.get("INT8COMPILE_CPU_ISA") or "auto"


def tuned_is_ignored() -> bool:
    """Whether ``INT8COMPILE_IGNORE_TUNED=1`` leaves the table that ``int8compile tune`` wrote unread."""
    return _switch("INT8COMPILE_IGNORE_TUNED")


def cuda_archs() -> str | None:
    """The architectures that CUDA kernels are built for, from ``INT8COMPILE_CUDA_ARCHS`` ("80;90a"); None: those here.

    For building where the GPU is not, as in a container image.
    """
    return os.environ.get("INT8COMPILE_CUDA_ARCHS") or None


def disabled() -> bool:
    """Whether ``INT8COMPILE_DISABLE=1`` leaves every model in float, to see what int8 changes and what it does not."""
    return _switch("INT8COMPILE_DISABLE")


def _switch(variable: str) -> bool:
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise OptionValueError(variable, value, "1, 0 or nothing")
    return value == "1"
