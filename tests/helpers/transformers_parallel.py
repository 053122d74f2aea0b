"""What tests of transformers' plans for tensor parallelism run in each process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from compiling import compile_eager
from tensor_parallel import relative, sites
from torch import distributed

import int8compile
from int8compile.integrations.transformers import Int8Config
from int8compile.report import Reason

LLAMA = transformers.LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=256,
    attention_bias=True,
)
MIXTRAL = transformers.MixtralConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=256,
    num_local_experts=4,
    num_experts_per_tok=2,
)
IDS = torch.arange(12).view(1, 12)


def _saved(config: Any, folder: str, rank: int) -> str:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if rank == 0:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
    distributed.barrier()
    return folder


def _contents(file: Path) -> tuple[Any, bytes]:
    """Of a file of safetensors: its header, whose metadata come in any order, and all else."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _load(folder: str, world: int = 1, **kwargs: Any) -> Any:
    if world > 1:
        kwargs["distributed_config"] = transformers.DistributedConfig(tp_size=world)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@torch.no_grad()
def compiled_models(rank: int, world: int, folder: str) -> None:
    """Each linear, and each expert, that one process has in int8."""
    for config, dtype in ((LLAMA, torch.float32), (MIXTRAL, torch.bfloat16)):
        path = _saved(config, f"{folder}/{config.model_type}", rank)
        whole = _load(path, dtype=dtype)
        want = whole(IDS, use_cache=False).logits
        torch._dynamo.reset()
        noise = relative(compile_eager(whole, skip_output_embeddings=False)(IDS, use_cache=False).logits, want)
        expected = sites(int8compile.last_report())
        torch._dynamo.reset()
        split = compile_eager(_load(path, world, dtype=dtype), skip_output_embeddings=False)
        assert 0 < relative(split(IDS, use_cache=False).logits, want) < 1.5 * noise
        assert sites(int8compile.last_report()) == expected


@torch.no_grad()
def int8_models(rank: int, world: int, folder: str) -> None:
    """Quantised while loading, each process its shard; saved, the files of one process to the bit."""
    path = _saved(LLAMA, f"{folder}/float", rank)
    whole = _load(path, quantization_config=Int8Config())
    want = _load(path)(IDS, use_cache=False).logits
    noise = relative(whole(IDS, use_cache=False).logits, want)
    split = _load(path, world, quantization_config=Int8Config())
    layer = split.model.layers[0]
    assert layer.self_attn.q_proj.weight.to_local().shape == (128 // world, 128)
    assert layer.mlp.down_proj.weight.to_local().shape == (128, 256 // world)
    eager = split(IDS, use_cache=False).logits
    assert 0 < relative(eager, want) < 1.5 * noise
    compiled = compile_eager(split)
    assert 0 < relative(compiled(IDS, use_cache=False).logits, want) < 1.5 * noise
    assert len(sites(int8compile.last_report())) == 15
    if rank == 0:
        whole.save_pretrained(f"{folder}/one")
    split.save_pretrained(f"{folder}/several")
    distributed.barrier()
    with pytest.raises(ValueError, match="load the float one"):
        _load(f"{folder}/one", world)
    mixture = _load(_saved(MIXTRAL, f"{folder}/mixture", rank), world, quantization_config=Int8Config())
    reasons = {site.path: site.reason for site in mixture.hf_quantizer.report.sites}
    assert reasons["model.layers.0.mlp.experts.down_proj"] is Reason.EXPERTS
    assert reasons["model.layers.0.self_attn.q_proj"] is Reason.PREQUANTIZED
    want = _load(f"{folder}/mixture")(IDS, use_cache=False).logits
    assert 0 < relative(mixture(IDS, use_cache=False).logits, want) < 0.05
    for file in Path(folder, "one").glob("*.safetensors"):
        assert _contents(file) == _contents(Path(folder, "several", file.name)), file.name
