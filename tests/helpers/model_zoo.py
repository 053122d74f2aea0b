"""Tiny random models of many architectures, what ``backend="int8"`` must find in each, and a table of what it did.

    python tests/helpers/model_zoo.py [--markdown] [--compiler inductor] [NAME ...]

Expected counts are derived from the architectures (the comment at each entry does the sum), so that a linear lost
by a new release of torch or transformers shows. All dimensions are as small as they can be: a model is here for the
way it writes its linears, not for its size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table
import torch
import transformers
from gold import emulate, relative_error
from small_modules import BrokenMlp, Mlp, PartlyAutocast, Refusals
from torch import nn
from torch._dynamo.utils import counters

import int8compile
from int8compile.backend import compile_rewritten
from int8compile.config import Int8Config
from int8compile.report import Reason, Report

Inputs = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Args:
        build: makes it, with any weights; they are drawn anew.
        inputs: makes the keyword arguments it is called with.
        int8: how many linears are to be rewritten.
        left: how many are left in float, by reason.
        breaks: how many graph breaks the model has, whatever the backend.
        autocast: whether it runs under ``torch.autocast`` in bfloat16.
        options: further options of the backend.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    int8: int
    left: dict[Reason, int] = dataclasses.field(default_factory=dict)
    breaks: int = 0
    autocast: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def all_options(self) -> dict[str, Any]:
        return {"min_features": 0, **self.options}

    def make(self) -> tuple[nn.Module, Inputs]:
        """The model, ready for inference, with its inputs; the same ones each time."""
        torch.manual_seed(0)
        model = self.build().eval()
        randomize(model)
        return model, self.inputs()

    def context(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.autocast)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What Dynamo made of a model: graphs compiled, and graph breaks."""

    graphs: int
    breaks: int


@dataclasses.dataclass(frozen=True)
class Row:
    """What the backend made of a model.

    Args:
        outliers: how many of the rewritten linears met an outlier column.
        ours, plain: with this backend, and without.
        error: of the output, relative to the eager emulation of LLM.int8().
        float_error: of the float model's output, relative to the same.
    """

    entry: Entry
    report: Report
    outliers: int
    ours: Counts
    plain: Counts
    error: float
    float_error: float

    @property
    def left(self) -> Counter[Reason]:
        return Counter(site.reason for site in self.report.sites if not site.rewritten)

    @property
    def left_in_words(self) -> str:
        return ", ".join(f"{count} {reason.name}" for reason, count in self.left.items())


def randomize(model: nn.Module) -> None:
    """Draw weights that keep activations near unit size, so that every layer matters, and plant outlier features.

    Initial weights of 0.02 would let a tiny model's residual stream drown its layers. Trained models have their
    outliers in a few features behind a normalisation; here features 1 and 5 are eight times as large as the others.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for module in model.modules():
            if type(module).__name__.endswith("Norm") and module.weight.numel() > 8:
                module.weight[[1, 5]] = 8.0


def eagerly(entry: Entry) -> Callable[..., Any]:
    """A backend that rewrites as ours does but runs the rewritten graph eagerly: inductor takes far longer."""

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None) -> Callable[..., Any]:
        config = Int8Config.make(entry.all_options, mode=mode)
        return compile_rewritten(gm, inputs, config, lambda gm, *_: gm.forward)

    return backend


class BrokenByTorchError(Exception):
    """This torch's Dynamo breaks a graph of the model, whatever the backend, so paths are relative to its parts.

    (Dynamo of torch 2.11 does not trace the ``copy.deepcopy`` of transformers' encoder-decoders.)
    """


def check_traceable(entry: Entry) -> None:
    """
    Raises:
        BrokenByTorchError: see there.
    """
    model, inputs = entry.make()
    with torch.no_grad(), entry.context():
        _plain(entry, model, inputs)


def measure(entry: Entry, *, inductor: bool = False) -> Row:
    """Compile an entry with our backend, and compare with plain Dynamo, the emulation and the float model.

    Raises:
        BrokenByTorchError: see there.
    """
    model, inputs = entry.make()
    with torch.no_grad(), entry.context():
        plain, float_out = _plain(entry, model, inputs)
        chosen = {"backend": "int8", "options": entry.all_options} if inductor else {"backend": eagerly(entry)}
        ours, out = _run(model, inputs, **chosen)
        report = int8compile.last_report()
        assert report is not None
        with emulate(model, [site.path for site in report.sites if site.rewritten]) as tally:
            expected = output(model(**inputs))
    assert out.dtype == expected.dtype, f"output is {out.dtype}, of the emulation {expected.dtype}"
    error, float_error = relative_error(out, expected), relative_error(float_out, expected)
    return Row(entry, report, tally.with_outliers, ours, plain, error, float_error)


def _plain(entry: Entry, model: nn.Module, inputs: Inputs) -> tuple[Counts, torch.Tensor]:
    counts, out = _run(model, inputs, backend=lambda gm, example_inputs: gm.forward)
    if counts.breaks > entry.breaks:
        raise BrokenByTorchError(f"torch {torch.__version__} alone has {counts.breaks} graph breaks in {entry.name}")
    return counts, out


def _run(model: nn.Module, inputs: Inputs, **how: Any) -> tuple[Counts, torch.Tensor]:
    torch._dynamo.reset()
    counters.clear()
    out = output(torch.compile(model, **how)(**inputs))
    return Counts(counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())), out


def output(out: Any) -> torch.Tensor:
    """The tensor that a model's result comes down to."""
    if isinstance(out, torch.Tensor):
        return out
    return out["logits"] if "logits" in out else out["logits_per_image"]


# The models. Sizes have the names that most of transformers' configurations give them.
_VOCABULARY = 96
_SIZES = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_VISION = {k: v for k, v in _SIZES.items() if k.endswith(("_size", "_layers", "_heads")) and k != "vocab_size"}
_VISION |= {"image_size": 16, "patch_size": 8}
_LM_HEAD = {Reason.OUTPUT_EMBEDDING: 1}
# Inductor keeps bf16 intermediates in fp32 where it can, and so does our attention; here they are to be rounded as
# eager rounds them.
_ROUNDED = {"inductor": {"emulate_precision_casts": True}, "attention": "torch"}


def tokens(length: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _VOCABULARY, (2, length), generator=generator)


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _text() -> Inputs:
    return {"input_ids": tokens()}


def _speech() -> Inputs:
    return {"input_features": _noise(2, 8, 16), "decoder_input_ids": tokens(4)}


def _pair() -> Inputs:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(4, seed=1)}


def _image() -> Inputs:
    return {"pixel_values": _noise(2, 3, 16, 16)}


def _vectors() -> Inputs:
    return {"src": _noise(2, 7, 32)}


def _target() -> Inputs:
    return {"tgt": _noise(2, 7, 32), "memory": _noise(2, 9, 32)}


def _hf(name: str, task: str, **config: Any) -> Callable[[], nn.Module]:
    """A builder: ``_hf("Llama", "ForCausalLM", ...)`` makes a LlamaForCausalLM of that configuration."""
    family = name.removesuffix("Text")

    def build() -> nn.Module:
        configuration = getattr(transformers, f"{name}Config")(**config)
        return getattr(transformers, family + task)(configuration)

    return build


def gpt2(layers: int = 2) -> nn.Module:
    sizes = {"vocab_size": _VOCABULARY, "n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 64}
    return _hf("GPT2", "LMHeadModel", **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)()


def llama(layers: int = 2) -> nn.Module:
    return _hf("Llama", "ForCausalLM", **{**_GROUPED, "num_hidden_layers": layers})()


def mixtral(layers: int = 2) -> nn.Module:
    return _hf("Mixtral", "ForCausalLM", **{**_GROUPED, "num_hidden_layers": layers}, num_local_experts=4)()


def _clip() -> nn.Module:
    text = {**_SIZES, "num_hidden_layers": 1, "eos_token_id": _VOCABULARY - 1}
    vision = {**_VISION, "num_hidden_layers": 1}
    return _hf("CLIP", "Model", text_config=text, vision_config=vision, projection_dim=16)()


def _whisper() -> nn.Module:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    lengths = {"max_source_positions": 8, "max_target_positions": 16}
    return _hf("Whisper", "ForConditionalGeneration", vocab_size=_VOCABULARY, **layers, **sizes, **lengths, **ends)()


def _encoder(activation: Callable[..., torch.Tensor]) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation=activation)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2)


_GEMMA3 = {**_GROUPED, "head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_BLOOM = {"vocab_size": _VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_OPT = {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16}
_T5 = {"vocab_size": _VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}

_ROUTERS = {Reason.ROUTER: 2, **_LM_HEAD}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_GPT_OSS = {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_DEEPSEEK = {
    **{**_EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1},
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
}

ZOO = (
    # 2 layers of q k v o, gate up down = 14, and lm_head. Qwen2 has biases, Qwen3 norms its heads, lm_head of Gemma3
    # is tied.
    Entry("Llama", llama, _text, 14, _LM_HEAD),
    Entry("Mistral", _hf("Mistral", "ForCausalLM", **_GROUPED, sliding_window=4), _text, 14, _LM_HEAD),
    Entry("Qwen2", _hf("Qwen2", "ForCausalLM", **_GROUPED), _text, 14, _LM_HEAD),
    Entry("Qwen3", _hf("Qwen3", "ForCausalLM", **_GROUPED, head_dim=8), _text, 14, _LM_HEAD),
    Entry("Gemma3", _hf("Gemma3Text", "ForCausalLM", **_GEMMA3), _text, 14, _LM_HEAD),
    # 2 layers of qkv o, gate_up down = 8.
    Entry("Phi3", _hf("Phi3", "ForCausalLM", **_GROUPED), _text, 8, _LM_HEAD),
    # 2 layers of qkv o, up down = 8: as addmm with a [K, N] weight in GPT-2, as x @ w.T in Falcon.
    Entry("GPT-2", gpt2, _text, 8, _LM_HEAD),
    Entry("GPT-NeoX", _hf("GPTNeoX", "ForCausalLM", **_SIZES), _text, 8, _LM_HEAD),
    Entry("BLOOM", _hf("Bloom", "ForCausalLM", **_BLOOM), _text, 8, _LM_HEAD),
    Entry("Falcon", _hf("Falcon", "ForCausalLM", **_SIZES), _text, 8, _LM_HEAD),
    # 2 layers of q k v o, up down = 12, and project_in, project_out around them, as in OPT-350m.
    Entry("OPT", _hf("OPT", "ForCausalLM", **_OPT), _text, 14, _LM_HEAD),
    # 2 layers of q k v o, and of the experts gate_up down = 12; 2 routers. gpt-oss stores its experts [E, K, N], with
    # biases, gate and up interleaved.
    Entry("Mixtral", mixtral, _text, 12, _ROUTERS),
    Entry("Qwen3-MoE", _hf("Qwen3Moe", "ForCausalLM", **_EXPERTS, num_experts=8, head_dim=8), _text, 12, _ROUTERS),
    Entry("OLMoE", _hf("Olmoe", "ForCausalLM", **_EXPERTS, num_experts=8), _text, 12, _ROUTERS),
    Entry("gpt-oss", _hf("GptOss", "ForCausalLM", **_EXPERTS, **_GPT_OSS), _text, 12, _ROUTERS),
    # A dense layer and one with experts: 2 of q_a q_b kv_a kv_b o, gate up down of the dense layer and of the shared
    # expert, gate_up down of the routed ones = 18; the router.
    Entry("DeepSeek-V3", _hf("DeepseekV3", "ForCausalLM", **_DEEPSEEK), _text, 18, {**_LM_HEAD, Reason.ROUTER: 1}),
    # 2 layers of q k v o, up down = 12; then the transform of the masked-LM head, or both linears of the classifier,
    # or the one of ViT's.
    Entry("BERT", _hf("Bert", "ForMaskedLM", **_SIZES), _text, 13, _LM_HEAD),
    Entry("RoBERTa", _hf("Roberta", "ForSequenceClassification", **_SIZES), _text, 14),
    Entry("ViT", _hf("ViT", "ForImageClassification", **_VISION), _image, 13),
    # 1 + 1 layers of 6, and the projections of both towers.
    Entry("CLIP", _clip, lambda: _text() | _image(), 14),
    # A layer of 6 in the encoder; 6 and 4 of cross-attention in the decoder.
    Entry("Whisper", _whisper, _speech, 16, _LM_HEAD),
    Entry("T5", _hf("T5", "ForConditionalGeneration", **_T5), _pair, 16, _LM_HEAD),
    Entry("Llama, autocast bf16", llama, _text, 14, _LM_HEAD, autocast=True, options=_ROUNDED),
    Entry("GPT-2, autocast bf16", gpt2, _text, 8, _LM_HEAD, autocast=True, options=_ROUNDED),
    # 2 layers of qkv o, up down: with the usual activations each layer is one fused call, with others its attention is.
    Entry("TransformerEncoder", lambda: _encoder(nn.functional.relu), _vectors, 8),
    Entry("TransformerEncoder, SiLU", lambda: _encoder(nn.functional.silu), _vectors, 8),
    # 2 layers of qkv o, q kv o of cross-attention (rows of one parameter), up down.
    Entry("TransformerDecoder", _decoder, _target, 14),
    Entry("MLP", Mlp, _vectors, 2),
    Entry("MLP, one linear in autocast", PartlyAutocast, _vectors, 2),
    Entry("MLP, graph break", BrokenMlp, _vectors, 2, breaks=1),
    Entry(
        "MLP and refusals",
        Refusals,
        _vectors,
        2,
        {Reason.SKIPPED: 1, Reason.NOT_CONSTANT: 1, Reason.DTYPE: 1},
        options={"llm_int8_skip_modules": ["head"]},
    ),
)


def tabulate(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for name in ("linears", "int8", "with outliers"):
        table.add_column(name, justify="right")
    table.add_column("left in float")
    for name in ("breaks: int8", "inductor", "error", "of float"):
        table.add_column(name, justify="right")
    for row in rows:
        counts = (len(row.report.sites), row.report.rewritten, row.outliers)
        breaks = (row.ours.breaks, row.plain.breaks)
        errors = (f"{row.error:.1e}", f"{row.float_error:.1e}")
        table.add_row(row.entry.name, *map(str, counts), row.left_in_words, *map(str, breaks), *errors)
    text = io.StringIO()
    rich.console.Console(file=text, width=140, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + "\n"


def markdown(rows: Sequence[Row]) -> str:
    """The rows as the table of ``docs/models.md``."""
    header = ("model", "linears", "int8", "left in float", "graph breaks: int8 / inductor", "error", "of float")
    table: list[tuple[str, ...]] = [header, ("---",) * len(header)]
    for row in rows:
        counts = (str(len(row.report.sites)), str(row.report.rewritten))
        breaks = f"{row.ours.breaks} / {row.plain.breaks}"
        errors = (f"{row.error:.1e}", f"{row.float_error:.1e}")
        table.append((row.entry.name, *counts, row.left_in_words, breaks, *errors))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def main() -> None:
    parser = argparse.ArgumentParser(description="What backend='int8' does to each model of the zoo.")
    parser.add_argument("names", nargs="*", help="models to run; all if none is given")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/models.md")
    parser.add_argument("--compiler", choices=("eager", "inductor"), default="eager", help="runs the rewritten graphs")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {entry.name for entry in ZOO}
    if unknown:
        parser.error(f"no model named {', '.join(sorted(unknown))}; there are {', '.join(e.name for e in ZOO)}")
    chosen = [entry for entry in ZOO if not arguments.names or entry.name in arguments.names]
    rows = []
    for entry in chosen:
        try:
            rows.append(measure(entry, inductor=arguments.compiler == "inductor"))
        except BrokenByTorchError as error:
            print(f"left out: {error}", file=sys.stderr)
    print(markdown(rows) if arguments.markdown else tabulate(rows), end="")


if __name__ == "__main__":
    main()
