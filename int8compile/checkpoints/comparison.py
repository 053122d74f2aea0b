"""``int8compile quantize --verify``: compares the outputs of an int8 checkpoint with those of its float original."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers

from int8compile.checkpoints.convert import empty_model
from int8compile.checkpoints.example_inputs import example_inputs
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.integrations.transformers import take_over_bitsandbytes
from int8compile.integrations.transformers.experts import has_single_form


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Outputs of an int8 checkpoint beside those of the float one: relative error, and how often the best agree."""

    error: float
    agreement: float


def check_comparable(source: Path, format: str) -> None:
    """Whether ``compare`` can be asked for, before there is anything to compare.

    Raises:
        OptionValueError: a format whose reader is not installed or cannot read this model, or a model with unknown
            inputs.
        CheckpointError: as ``empty_model``.
    """
    if format == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is None:
        raise OptionValueError("verify", True, "False, or what reads that format: pip install compressed-tensors")
    model = empty_model(source)
    if format == "compressed-tensors" and has_single_form(model):
        expected = f"False for a {type(model).__name__}: transformers reads no int8 experts of that format, vLLM does"
        raise OptionValueError("verify", True, expected)
    _inputs(model)


def compare(source: Path, target: Path, format: str) -> Comparison:
    """Run both checkpoints on the same random tokens, pixels or sounds.

    Raises:
        OptionValueError: as ``check_comparable``.
        CheckpointError: as there, or the int8 model's outputs are not finite where the float model's are.
    """
    check_comparable(source, format)
    config = transformers.AutoConfig.from_pretrained(source)
    family = getattr(transformers, (config.architectures or ["AutoModel"])[0])
    model = family.from_pretrained(source)
    inputs = _inputs(model)
    want = _outputs(model, inputs)
    del model
    take_over_bitsandbytes(format == "bitsandbytes")
    try:
        got = _outputs(family.from_pretrained(target), inputs)
    finally:
        take_over_bitsandbytes(False)
    if want.isfinite().all() and not got.isfinite().all():
        raise CheckpointError("the model's output", "is not finite", "finite numbers, as from the float model", target)
    agreement = (got.argmax(-1) == want.argmax(-1)).double().mean()
    return Comparison(float((got - want).norm() / want.norm()), float(agreement))


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    inputs = example_inputs(model, length=64)
    if inputs is None:
        expected = f"False for a {type(model).__name__}, whose inputs ({model.main_input_name}) cannot be guessed"
        raise OptionValueError("verify", True, expected)
    return inputs.tensors


@torch.no_grad()
def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    dtype = model.dtype
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    first: torch.Tensor = model(**inputs, return_dict=False)[0]
    return first.double()
