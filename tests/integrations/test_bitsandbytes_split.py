"""What is int8 and what is float in bitsandbytes' format, by transformers' rules, not by ours; without bitsandbytes."""

import json
import re

import pytest
import torch
import transformers
from model_zoo import ZOO, output, tokens
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import int8compile
from int8compile import Int8Linear, Reason, quantize_
from int8compile.checkpoints.convert import quantize_folder
from int8compile.errors import OptionValueError
from int8compile.integrations.transformers import (
    Int8Config,
    bitsandbytes,
    refused_linears,
    save_pretrained,
    take_over_bitsandbytes,
)
from int8compile.weights.formats import absmax_of

ENTRIES = {entry.name: entry for entry in ZOO}
SMALL = {"min_features": 0}


@pytest.fixture(autouse=True)
def taken_over():
    take_over_bitsandbytes()
    yield
    take_over_bitsandbytes(False)


def int8_model(name="Llama", dtype=torch.float32, **options):
    model, inputs = ENTRIES[name].make()
    model = model.to(dtype).requires_grad_(False)
    quantize_(model, {**SMALL, **options})
    return model, inputs


def int8_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if isinstance(module, Int8Linear)}


def result(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs))


def skipped_by_transformers_5_0(path: str, patterns: list[str]) -> bool:
    """Its first rule, without the boundary that later ones ask for behind a match."""
    return any(re.match(p, path) or path.endswith(p) for p in patterns)


@pytest.mark.parametrize(
    ("left", "int8", "written"),
    [
        ([], ["lm_head"], []),
        (["lm_head"], ["model.fc"], ["lm_head"]),
        (["classifier"], ["pre_classifier"], ["^classifier$"]),
        (["pre_classifier"], ["classifier"], ["pre_classifier"]),
        (["layers.1"], ["layers.11", "layers.2"], [r"^layers\.1$"]),
        (["layers.11"], ["layers.1"], ["layers.11"]),
        (["a.b"], ["a.b.c"], [r"^a\.b$"]),
        (["fc"], ["mlp.fc"], ["^fc$"]),
        (["a.b"], ["aab"], [r"^a\.b$"]),  # where a plain dot is any character
        (["we+ird"], ["weeird"], [r"^we\+ird$"]),
        (["open("], ["fc"], [r"^open\($"]),
    ],
)
def test_a_list_names_these_modules_and_no_others(left, int8, written):
    assert bitsandbytes.skip_list(left, int8) == written
    for skipped in (skipped_by_transformers_5_0, lambda path, patterns: not should_convert_module(path, patterns)):
        assert all(skipped(path, written) for path in left)
        assert not any(skipped(path, written) for path in int8)


def test_a_rule_that_reads_the_list_otherwise_is_an_error(monkeypatch, tmp_path):
    model, _ = int8_model()
    monkeypatch.setattr(bitsandbytes, "should_convert_module", lambda path, patterns: not (patterns and "up" in path))
    with pytest.raises(OptionValueError, match=r"format='bitsandbytes'.*layers\.0\.mlp\.up_proj"):
        save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    assert not (tmp_path / "bnb").exists()
    save_pretrained(model, tmp_path / "ours")
    assert model.config.quantization_config.quant_method == "int8compile"


def test_what_is_always_float_there_is_written_as_the_floats_it_stands_for(tmp_path, caplog):
    model, inputs = int8_model("T5")
    wo = {path for path in int8_paths(model) if path.endswith(".wo")}
    assert len(wo) == 2
    save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("int8compile")]
    assert message.endswith("decoder.block.*.layer.*.DenseReluDense.wo, encoder.block.*.layer.*.DenseReluDense.wo")
    entries = load_file(tmp_path / "bnb" / "model.safetensors")
    for path in int8_paths(model):
        assert (f"{path}.SCB" in entries) == (path not in wo) == (entries[f"{path}.weight"].dtype == torch.int8)
    for path in wo:
        assert torch.equal(entries[f"{path}.weight"], model.get_submodule(path).dequantize())
    again, info = type(model).from_pretrained(tmp_path / "bnb", output_loading_info=True)
    assert not any(info.values())
    assert int8_paths(again) == int8_paths(model) - wo
    # Nothing of it stays with the model, whose own format holds all.
    model.save_pretrained(tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert torch.equal(result(again, inputs), result(model, inputs))


def test_a_conv1d_is_written_as_the_kind_of_float_that_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "_keep_in_fp32_modules", ["mlp.c_fc"])
    model, inputs = int8_model("GPT-2")
    save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    entries = load_file(tmp_path / "bnb" / "model.safetensors")
    assert tuple(entries["transformer.h.0.mlp.c_fc.weight"].shape) == (32, 128)  # [K, N]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    assert int8_paths(again) == {path for path in int8_paths(model) if not path.endswith("c_fc")}
    assert (result(again, inputs) - result(model, inputs)).norm() < 0.04 * result(model, inputs).norm()


@pytest.mark.parametrize("name", ["T5", "Falcon"])
def test_the_command_leaves_in_float_what_is_float_there(tmp_path, name):
    model, _ = ENTRIES[name].make()
    model.save_pretrained(tmp_path / "float")
    done = quantize_folder(tmp_path / "float", tmp_path / "bnb", Int8Config(**SMALL), "bitsandbytes")
    left = {site.path for site in done.sites if site.detail == "float to bitsandbytes"}
    assert left == bitsandbytes.float_linears(model) != set()
    source, entries = (load_file(tmp_path / folder / "model.safetensors") for folder in ("float", "bnb"))
    assert all(torch.equal(entries[f"{path}.weight"], source[f"{path}.weight"]) for path in left)
    again, info = type(model).from_pretrained(tmp_path / "bnb", output_loading_info=True)
    assert not any(info.values())
    assert int8_paths(again) == {site.path for site in done.sites if site.rewritten}


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_a_model_that_keeps_its_float_weights_has_no_other_format(tmp_path, format):
    model, _ = int8_model(llm_int8_has_fp16_weight=True)
    with pytest.raises(OptionValueError, match="llm_int8_has_fp16_weight"):
        save_pretrained(model, tmp_path / "other", format=format)
    assert not (tmp_path / "other").exists()


def test_a_model_that_is_built_otherwise_there_is_refused(tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
    experts = {"intermediate_size": 64, "intermediate_size_mlp": 64, "num_hidden_layers": 1, "num_local_experts": 2}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes, **experts, **ends))
    quantize_(model.requires_grad_(False), SMALL)
    with pytest.raises(OptionValueError, match="other modules in place of Llama4TextExperts"):
        save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    assert not (tmp_path / "bnb").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_checkpoint_of_small_linears_loads_to_the_bit(tmp_path, dtype):
    """The config names no min_features, and scales are not rounded to the model's dtype."""
    model, inputs = ENTRIES["Llama"].make()
    model.to(dtype).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=dtype).requires_grad_(False)
    quantize_(model, SMALL)
    for module in model.modules():
        if isinstance(module, Int8Linear):
            module.weight_scale = module.weight_scale * 127 * 1.0001 / 127  # its absmax is no 16-bit number
    save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb", output_loading_info=True)
    assert not any(info.values())
    assert again.hf_quantizer.config.min_features > 32
    assert torch.equal(result(again, inputs), result(model, inputs))
    for path in int8_paths(model):
        assert torch.equal(again.get_submodule(path).weight_scale, model.get_submodule(path).weight_scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_an_scb_of_any_float_dtype_is_taken_and_of_no_other(tmp_path, dtype):
    model, inputs = int8_model()
    save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    file = tmp_path / "bnb" / "model.safetensors"
    entries = {key: t.to(dtype) if key.endswith(".SCB") else t for key, t in load_file(file).items()}
    save_file(entries, file, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    for path in int8_paths(model):
        assert torch.equal(again.get_submodule(path).weight_scale, entries[f"{path}.SCB"].float() / 127)
    assert (result(again, inputs) - result(model, inputs)).norm() < 0.02 * result(model, inputs).norm()
    codes = {key: t.char() if key.endswith(".SCB") else t for key, t in entries.items()}
    save_file(codes, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="CONVERSION"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_absmax_of_16_bits_comes_back_to_the_bit(dtype):
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).float()
    every = every[every.isfinite() & ((every == 0) | (every > 1e-30))]  # a subnormal's 127th is many numbers'
    assert every.numel() > 28000
    assert torch.equal(absmax_of(every / 127.0), every)


def test_floats_beside_int8_come_in_the_dtype_that_is_asked_for(tmp_path):
    model, inputs = int8_model(dtype=torch.bfloat16)
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.up_proj.to_float()
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert type(again.model.layers[0].mlp.up_proj) is nn.Linear
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert result(again, inputs).dtype == torch.float32


def test_quantize_leaves_what_from_pretrained_leaves(tmp_path):
    """T5's wo, which is float32 in an fp16 model for the range of its results."""
    ENTRIES["T5"].make()[0].half().save_pretrained(tmp_path / "float")
    family = transformers.T5ForConditionalGeneration
    model = family.from_pretrained(tmp_path / "float", dtype=torch.float16).requires_grad_(False)
    report = quantize_(model, SMALL)
    loaded = family.from_pretrained(tmp_path / "float", dtype=torch.float16, quantization_config=Int8Config(**SMALL))
    reasons = {site.path: (site.reason, site.detail) for site in loaded.hf_quantizer.report.sites}
    said = {site.path: (site.reason, site.detail) for site in model.hf_quantizer.report.sites}
    assert said == reasons
    assert sum(detail == "_keep_in_fp32_modules" for _, detail in said.values()) == 2
    assert report.rewritten == loaded.hf_quantizer.report.rewritten == 14


def test_names_with_dots_are_kept_in_float32_too():
    model, _ = ENTRIES["Llama"].make()
    model._keep_in_fp32_modules_strict = {"mlp.gate_proj.weight"}
    refused = refused_linears(model, torch.bfloat16)
    assert {path for path, why in refused.items() if why[0] is Reason.SKIPPED} == {
        f"model.layers.{i}.mlp.gate_proj" for i in range(2)
    }


def test_a_tied_output_embedding_in_int8_is_tied_no_more(tmp_path):
    model, inputs = ENTRIES["Gemma3"].make()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    quantize_(model.requires_grad_(False), {**SMALL, "skip_output_embeddings": False})
    for save in (model.save_pretrained, lambda folder: save_pretrained(model, folder, format="bitsandbytes")):
        save(tmp_path / "int8")
        again, info = type(model).from_pretrained(tmp_path / "int8", output_loading_info=True)
        assert not any(info.values())
        assert int8_paths(again) == int8_paths(model) >= {"lm_head"}
        assert torch.equal(result(again, inputs), result(model, inputs))
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


class OddConfig(transformers.PretrainedConfig):
    model_type = "odd"


class Linear(nn.Linear):
    """A subclass."""


class Odd(transformers.PreTrainedModel):
    """Two linears that are tied, one at two places, a subclass, and names that are parts of others."""

    config_class = OddConfig
    _tied_weights_keys = {"two.weight": "one.weight", "again.weight": "fc.weight", "again.bias": "fc.bias"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        for name in ("one", "two", "fc", "pre_fc", "fc2"):
            self.add_module(name, nn.Linear(32, 32))
        self.sub, self.again = Linear(32, 32), self.fc
        self.post_init()

    def forward(self, x):
        for name in ("one", "two", "fc", "pre_fc", "fc2", "sub", "again"):
            x = x + torch.tanh(self.get_submodule(name)(x))
        return x


def odd() -> nn.Module:
    model = Odd(OddConfig(tie_word_embeddings=True)).eval().requires_grad_(False)
    assert model.two.weight is model.one.weight
    return model


@pytest.mark.parametrize("format", ["int8compile", "bitsandbytes"])
@pytest.mark.parametrize("tied", [True, False])
def test_shared_weights_shared_modules_and_subclasses_survive(tmp_path, format, tied):
    model, inputs = odd(), {"x": torch.randn(3, 32)}
    report = quantize_(model, {**SMALL, "skip_output_embeddings": tied, "llm_int8_skip_modules": ["pre_fc"]})
    # fc is tied, to itself at its other place
    float_here = {"one", "two", "pre_fc", "fc"} if tied else {"pre_fc"}
    assert {site.path for site in report.sites if not site.rewritten} == float_here
    save_pretrained(model, tmp_path / "int8", format=format)
    again, info = Odd.from_pretrained(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values())
    everything = {path for path, m in again.named_modules(remove_duplicate=False) if isinstance(m, Int8Linear)}
    # to bitsandbytes a subclass is float, and so is the other place
    float_there = {"sub", "again"} if format == "bitsandbytes" else set()
    want = {"one", "two", "fc", "again", "pre_fc", "fc2", "sub"} - float_here - float_there
    assert everything == want - ({"again"} if tied else set())
    got, expected = (m(**inputs) for m in (again, model))
    assert torch.equal(got, expected) if format == "int8compile" else (got - expected).norm() < 0.05 * expected.norm()
    if format == "bitsandbytes":
        skip = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
        split = {path for path in want if should_convert_module(path, skip["llm_int8_skip_modules"])}
        assert split == everything


@pytest.mark.parametrize(
    "skip", [["classifier"], ["lin1"], ["layer.1"], ["*.0.attention.*"], ["distilbert.transformer"]]
)
def test_a_list_means_the_same_modules_wherever_it_is_given(tmp_path, skip):
    sizes = {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}
    family = transformers.DistilBertForSequenceClassification
    model = family(transformers.DistilBertConfig(**sizes)).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "float")
    options = {**SMALL, "llm_int8_skip_modules": skip}
    reports = {
        "compile": int8compile.explain(model, input_ids=tokens(), options=options).sites,
        "command": quantize_folder(tmp_path / "float", tmp_path / "int8", Int8Config(**options)).sites,
        "loading": family.from_pretrained(
            tmp_path / "float", quantization_config=Int8Config(**options)
        ).hf_quantizer.report.sites,
        "in place": quantize_(model, options).sites,
    }
    splits = {who: {site.path for site in sites if site.rewritten} for who, sites in reports.items()}
    assert splits["in place"]
    assert all(split == splits["in place"] for split in splits.values()), splits
    assert len(splits["in place"]) < 14
