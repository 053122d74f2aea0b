"""llama.cpp with Q8_0 weights, as a contender of ``benchmarks/model``.

The GGUF file is written from the transformers model itself, so that both have the same weights: Q8_0 (blocks of 32
values, one fp16 scale each) for every matrix, the embedding that is also the output included; norms in fp32.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import AbsentError, peer

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class LlamaCpp:
    """A Llama model in llama.cpp; the methods are those of ``benchmarks.model.contender.Model``.

    Args:
        model: a transformers ``LlamaForCausalLM``, in any float dtype.

    Raises:
        AbsentError: llama-cpp-python is not installed, or cannot run such a model.
    """

    def __init__(self, model: Any) -> None:
        self._api = peer("llama_cpp")
        self._folder = tempfile.TemporaryDirectory(prefix="int8compile-gguf-")
        self._file = Path(self._folder.name) / "model-q8_0.gguf"
        write_q8_0(model, self._file)

    def open_cache(self, length: int, tokens: list[int] | None = None) -> None:
        """Make the context; ``tokens`` stay in it before whatever is decoded."""
        self._llm = self._api.Llama(
            str(self._file),
            n_ctx=length,
            n_batch=max(512, len(tokens or [])),
            n_ubatch=max(512, len(tokens or [])),
            n_threads=torch.get_num_threads(),
            n_threads_batch=torch.get_num_threads(),
            logits_all=True,
            verbose=False,
        )
        self._held = list(tokens or [])
        self._is_held = False

    def prompt(self, tokens: list[int]) -> float:
        """As ``Model.prompt``, but with all logits: it has no way to compute fewer."""
        return self.score(tokens)[0]

    def score(self, tokens: list[int]) -> tuple[float, float]:
        """A prompt in an empty context, with all logits: seconds, and mean negative log-likelihood (nats)."""
        self._is_held = False
        self._llm.reset()
        start = time.perf_counter()
        self._llm.eval(tokens)
        seconds = time.perf_counter() - start
        logits = torch.from_numpy(self._llm.scores[: len(tokens)])
        self._last = logits[-1].numpy().copy()
        return seconds, float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens[1:])))

    def decode(self, tokens: list[int], count: int) -> tuple[list[int], list[float]]:
        """As ``Model.decode``. After a prompt, what the cache held is evaluated anew first; that is not timed."""
        if not self._is_held:
            self._llm.reset()
            self._llm.eval(self._held)
            self._is_held = True
        new: list[int] = []
        seconds: list[float] = []
        pending = list(tokens)
        while len(new) < count:
            token = pending.pop(0) if pending else new[-1]
            start = time.perf_counter()
            self._llm.eval([token])
            logits = self._llm.scores[self._llm.n_tokens - 1]
            best = int(logits.argmax())
            seconds.append(time.perf_counter() - start)
            if not pending:
                new.append(best)
        self._last = logits.copy()
        self._held = list(self._llm.input_ids[: self._llm.n_tokens])
        return new, seconds

    def last_logits(self) -> Any:
        return self._last


def write_q8_0(model: Any, path: Path) -> None:
    """Write a transformers Llama model as a GGUF file with Q8_0 matrices and no vocabulary.

    Raises:
        AbsentError: the architecture is not Llama's, or its rotary embedding is scaled.
    """
    gguf = peer("gguf")
    config = model.config
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise AbsentError(f"{config.model_type} with rotary embedding {rope}: only plain Llama models are converted")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    tied = config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and tied:
            continue
        values = parameter.detach().float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleaved(values, head_dim)
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), values)
        else:
            writer.add_tensor(_gguf_name(name), gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows for llama.cpp's rotary embedding, which turns neighbours where transformers turns halves of a head."""
    n, k = values.shape
    return values.reshape(n // head_dim, 2, head_dim // 2, k).swapaxes(1, 2).reshape(n, k)


def _gguf_name(name: str) -> str:
    base = name.removesuffix(".weight")
    if base in _OUTER:
        return f"{_OUTER[base]}.weight"
    parts = base.split(".", 3)  # model.layers.7.self_attn.q_proj
    if len(parts) != 4 or parts[3] not in _LAYER:
        raise AbsentError(f"no place in a Llama GGUF file for {name}")
    return f"blk.{parts[2]}.{_LAYER[parts[3]]}.weight"
