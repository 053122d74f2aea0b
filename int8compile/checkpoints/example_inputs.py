"""What a transformers model can be called with, guessed from its configuration: random tokens, pixels or sounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class ExampleInputs(NamedTuple):
    """Arguments of a model by name, and in which dimensions others may be of other sizes, as torch.export has it."""

    tensors: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, Any]]


def example_inputs(model: Any, length: int) -> ExampleInputs | None:
    """Two of a model's main input, and two for its decoder if it has one; the same in every run.

    Args:
        model: of transformers; may be on the meta device.
        length: how many tokens.

    Returns:
        None if they cannot be guessed. Floats are float32, whatever the model's dtype.
    """
    config, name, random = model.config, model.main_input_name, torch.Generator().manual_seed(0)
    size = _image_size(config)
    any_size = torch.export.Dim.DYNAMIC
    shapes = {name: {0: any_size}}
    if name == "input_ids":
        main = _tokens(config, length, random)
        shapes[name][1] = any_size
    elif name == "pixel_values" and size is not None:
        main = torch.randn((2, getattr(config, "num_channels", 3), *size), generator=random)
    elif name == "input_features" and hasattr(config, "max_source_positions"):
        frames = 2 * config.max_source_positions  # the encoder's convolution halves them
        main = torch.randn((2, config.num_mel_bins, frames), generator=random)
    elif name == "input_values":
        main = torch.randn((2, 16000), generator=random)  # a second, as speech models sample it
    else:
        return None
    inputs = {name: main}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = _tokens(config, min(length, 16), random)
        shapes["decoder_input_ids"] = {0: any_size, 1: any_size}
    return ExampleInputs(inputs, shapes)


def _tokens(config: Any, length: int, random: torch.Generator) -> torch.Tensor:
    return torch.randint(config.get_text_config().vocab_size, (2, length), generator=random)


def _image_size(config: Any) -> tuple[int, int] | None:
    """Height and width; those that most models have where it is not said, as in a convolution's that takes any."""
    size = getattr(config, "image_size", None if config.is_encoder_decoder else 224)
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) and len(size) == 2 else None
