"""Other libraries' int8 linears in a transformers model: what ``torchao`` and ``bitsandbytes`` are in benchmarks.

Both leave the output embedding in float, as this package does by default.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from typing import Any

from torch import nn

EXTRAS = {"llama_cpp": "bench-llamacpp"}


class AbsentError(Exception):
    """A contender cannot run here; the message says why."""


def peer(package: str, module: str = "") -> Any:
    """A module of a peer's, or the package itself.

    Raises:
        AbsentError: it is not installed.
    """
    if importlib.util.find_spec(package) is None:
        extra = EXTRAS.get(package, "bench")
        raise AbsentError(f"{package} is not installed (pip install 'int8compile[{extra}]')")
    warnings.filterwarnings("ignore")
    for name in ("torch", "torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return importlib.import_module(f"{package}.{module}" if module else package)


def quantize_torchao_(model: nn.Module, *, weight_only: bool) -> None:
    """torchao's int8 linears: activations quantised dynamically for each token, or weights alone.

    Raises:
        AbsentError: torchao is not installed.
    """
    quantization = peer("torchao", "quantization")
    head = _head(model)
    if weight_only:
        config = quantization.Int8WeightOnlyConfig(set_inductor_config=False)
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantization.quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and m is not head)


def quantize_bitsandbytes_(model: nn.Module, threshold: float = 6.0) -> None:
    """``Linear8bitLt`` in the place of each linear, as transformers' ``load_in_8bit`` puts it.

    Raises:
        AbsentError: bitsandbytes is not installed.
    """
    bnb = peer("bitsandbytes", "nn")
    head = _head(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(parent, name, linear8bit(bnb, child.weight.data, child.bias, threshold))


def linear8bit(bnb: Any, weight: Any, bias: Any, threshold: float) -> Any:
    """A ``Linear8bitLt`` that holds the int8 form of a weight [N, K] on the CPU."""
    n, k = weight.shape
    layer = bnb.Linear8bitLt(k, n, bias=bias is not None, has_fp16_weights=False, threshold=threshold, device="meta")
    layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    layer.bias = bias
    return layer.to("cpu").eval()


def _head(model: Any) -> Any:
    return getattr(model, "get_output_embeddings", lambda: None)()
