"""A model of Llama-3.2-1B's shape with random weights: what a larger model costs, with no weights to download.

Its norms have a few large weights, so that the features behind them are outliers of LLM.int8(), as in trained models of
several billion parameters. What it says means nothing; what it costs does.
"""

from __future__ import annotations

import random
from typing import Any

import torch

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
    # For trying out the benchmark itself.
    "tiny": {
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    },
}

OUTLIER_FEATURES = 5
OUTLIER_GAIN = 20.0  # a normalised activation times this reaches 6.0 in three tokens of four
STD = 0.02


def random_llama(shape: str, dtype: torch.dtype) -> Any:
    """The model of a shape in ``SHAPES``, in eval mode.

    Weights are the same in every dtype (they are bfloat16 numbers), so that outputs can be compared.
    """
    import transformers
    from transformers import initialization

    config = transformers.LlamaConfig(**SHAPES[shape])
    with initialization.no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    features = random.Random(0).sample(range(config.hidden_size), OUTLIER_FEATURES)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.fill_(1.0)
            if "layers." in name:
                parameter.data[features] = OUTLIER_GAIN
        else:
            for rows in parameter.data.split(4096):
                rows.copy_((torch.randn(rows.shape, generator=generator) * STD).bfloat16())
    return model.eval()


def random_tokens(shape: str, count: int, length: int) -> list[list[int]]:
    """``count`` windows of ``length`` token ids, the same in each run."""
    source = random.Random(1)
    return [[source.randrange(SHAPES[shape]["vocab_size"]) for _ in range(length)] for _ in range(count)]
