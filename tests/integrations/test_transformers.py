"""from_pretrained with Int8Config: every architecture, tied and not, quantised while loading, saved, loaded again."""

import copy
import json
import logging
import pickle
import re
import subprocess
import sys

import pytest
import torch
import transformers
from compiling import compile_eager
from model_zoo import ZOO, Entry, output
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

import int8compile
from int8compile import Int8Experts, Int8Linear, Reason, quantize_
from int8compile.errors import OptionNameError, OptionValueError
from int8compile.integrations.transformers import Int8Config, save_pretrained

SMALL = {"min_features": 0}
ENTRIES = {entry.name: entry for entry in ZOO}
TEXT = ["Llama", "Qwen3", "Gemma3", "GPT-2", "BERT", "T5"]
OTHERS = ["ViT", "Whisper", "CLIP", "Falcon", "Phi3", "Mixtral", "Qwen3-MoE", "OLMoE", "gpt-oss", "DeepSeek-V3"]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, logger="transformers")


def float_model(name: str, tied: bool | None = None) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    entry: Entry = ENTRIES[name]
    model, inputs = entry.make()
    if tied is not None:
        config = copy.deepcopy(model.config)
        config.tie_word_embeddings = tied
        torch.manual_seed(0)
        model = type(model)(config).eval()
    return model.requires_grad_(False), inputs


def result(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs))


def load(model: nn.Module, folder, **kwargs):
    return type(model).from_pretrained(folder, **kwargs)


def int8_model(tmp_path, name="Llama", **options):
    model, inputs = float_model(name)
    model.save_pretrained(tmp_path / "float")
    return load(model, tmp_path / "float", quantization_config=Int8Config(**SMALL, **options)), inputs


@pytest.mark.parametrize(
    ("name", "tied"), [*((name, tied) for name in TEXT for tied in (True, False)), *((name, None) for name in OTHERS)]
)
def test_quantises_while_loading_and_round_trips_to_the_bit(tmp_path, name, tied):
    model, inputs = float_model(name, tied)
    model.save_pretrained(tmp_path / "float")
    loaded = load(model, tmp_path / "float", quantization_config=Int8Config(**SMALL))
    quantize_(in_place := copy.deepcopy(model), SMALL)
    assert torch.equal(result(loaded, inputs), result(in_place, inputs))
    if tied is None:
        assert loaded.hf_quantizer.report.rewritten == ENTRIES[name].int8
    int8 = [len(getattr(m, "int8", "1")) for m in loaded.modules() if isinstance(m, (Int8Linear, Int8Experts))]
    assert loaded.hf_quantizer.report.rewritten == sum(int8) > 0

    loaded.save_pretrained(tmp_path / "int8")
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for folder in ("int8", "sharded"):
        again, info = load(model, tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert torch.equal(result(again, inputs), result(loaded, inputs))
        mine, theirs = loaded.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) and mine[key].dtype == theirs[key].dtype for key in mine)


def test_agrees_with_the_backend_about_every_linear(tmp_path):
    model, inputs = float_model("Llama")
    loaded, _ = int8_model(tmp_path)
    mine = {site.path: site.reason for site in loaded.hf_quantizer.report.sites}
    report = int8compile.explain(model, **inputs, options=SMALL)
    backend = {site.path: site.reason for site in report.sites}
    in_int8 = {Reason.REWRITTEN: Reason.PREQUANTIZED}
    assert mine == {path: in_int8.get(reason, reason) for path, reason in backend.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models(tmp_path, dtype):
    model, inputs = float_model("Llama")
    model.to(dtype).save_pretrained(tmp_path / "float")
    model = load(model, tmp_path / "float")  # with its rotary embedding in float32, which .to(dtype) has cast too
    loaded = load(model, tmp_path / "float", quantization_config=Int8Config(**SMALL))
    layer = loaded.model.layers[0].mlp.up_proj
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.float_dtype) == (torch.int8, torch.float32, dtype)
    quantize_(model, SMALL)
    assert torch.equal(result(loaded, inputs), result(model, inputs))
    loaded.save_pretrained(tmp_path / "int8")
    again = load(model, tmp_path / "int8")
    assert torch.equal(result(again, inputs), result(loaded, inputs))
    assert again.dtype == dtype
    again.to(torch.float32)
    assert again.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.float32
    assert result(again, inputs).dtype == torch.float32


def test_t5_keeps_in_float32_what_it_must(tmp_path):
    model, _ = float_model("T5")
    model.save_pretrained(tmp_path / "float")
    loaded = load(model, tmp_path / "float", dtype=torch.float16, quantization_config=Int8Config(**SMALL))
    kept = {site.path.rpartition(".")[2] for site in loaded.hf_quantizer.report.sites if site.reason is Reason.SKIPPED}
    assert kept == {"wo"}
    assert {p.dtype for name, p in loaded.named_parameters() if ".wo." in name} == {torch.float32}


def test_config_goes_to_the_core_and_back():
    ours = Int8Config(llm_int8_threshold=5, llm_int8_skip_modules=["o_proj"], outlier_policy="element")
    assert Int8Config.from_core(ours.to_core()).to_dict() == ours.to_dict()
    assert Int8Config.from_dict(json.loads(ours.to_json_string())).to_dict() == ours.to_dict()
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["lm_head"])
    assert Int8Config.from_core(theirs).to_core() == int8compile.Int8Config.make(theirs)
    with pytest.raises(OptionNameError, match="Did you mean 'llm_int8_threshold'"):
        Int8Config(int8_threshold=6.0)
    with pytest.raises(OptionValueError, match="llm_int8_threshold='six'"):
        Int8Config(llm_int8_threshold="six")
    with pytest.raises(OptionNameError, match="release_weights"):
        Int8Config(release_weights=True)


def test_options_reach_the_modules_and_the_folder(tmp_path):
    options = {"llm_int8_threshold": 4, "outlier_policy": "element", "llm_int8_skip_modules": ["o_proj"]}
    loaded, inputs = int8_model(tmp_path, **options)
    loaded.save_pretrained(tmp_path / "int8")
    again = load(loaded, tmp_path / "int8")
    for model in (loaded, again):
        layer = model.model.layers[0]
        assert (layer.mlp.up_proj.threshold, layer.mlp.up_proj.outlier_policy) == (4.0, "element")
        assert type(layer.self_attn.o_proj) is nn.Linear
    assert torch.equal(result(again, inputs), result(loaded, inputs))


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_embedding_with_int8_weights(tmp_path, tied):
    """From a float checkpoint, from the int8 one that is saved then, and in place; a tied one is an int8 copy."""
    model, inputs = float_model("Llama", tied=tied)
    model.save_pretrained(tmp_path / "float")
    options = {**SMALL, "llm_int8_weight_only_modules": ["lm_head"]}
    loaded = load(model, tmp_path / "float", quantization_config=Int8Config(**options))
    loaded.save_pretrained(tmp_path / "int8")
    again, info = load(model, tmp_path / "int8", output_loading_info=True)
    assert not any(info.values())
    embedding = model.model.embed_tokens.weight.clone()
    quantize_(model, options)
    for each in (loaded, again, model):
        assert isinstance(each.lm_head, Int8Linear)
        assert (each.lm_head.outlier_policy, each.model.layers[0].mlp.up_proj.outlier_policy) == ("all", "column")
        assert torch.equal(each.model.embed_tokens.weight, embedding)
        assert torch.equal(result(each, inputs), result(model, inputs))
        sites = {site.path: site for site in each.hf_quantizer.report.sites}
        assert (sites["lm_head"].reason, sites["lm_head"].detail) == (Reason.PREQUANTIZED, "weights only")


@pytest.mark.parametrize("format", ["bitsandbytes", "compressed-tensors"])
def test_formats_that_quantise_every_activation_get_such_linears_in_float(tmp_path, format, caplog):
    loaded, _ = int8_model(tmp_path, llm_int8_weight_only_modules=["lm_head", "up_proj"])
    caplog.set_level(logging.WARNING, logger="int8compile")
    save_pretrained(loaded, tmp_path / "other", format=format)
    assert f"written in float, which they are to {format}: lm_head, model.layers.*.mlp.up_proj" in caplog.text
    written = load_file(tmp_path / "other" / "model.safetensors")
    up = loaded.model.layers[0].mlp.up_proj
    assert torch.equal(written["model.layers.0.mlp.up_proj.weight"], up.dequantize())
    assert written["model.layers.0.mlp.down_proj.weight"].dtype == torch.int8
    everything, _ = int8_model(tmp_path / "all", activation="float")
    with pytest.raises(OptionValueError, match=f"to {format} .* are float, all there are"):
        save_pretrained(everything, tmp_path / "none", format=format)


def test_a_base_model_and_a_new_head_of_the_same_checkpoint(tmp_path):
    loaded, inputs = int8_model(tmp_path, "BERT")
    loaded.save_pretrained(tmp_path / "int8")
    base = AutoModel.from_pretrained(tmp_path / "int8")
    assert torch.equal(result_hidden(base, inputs), result_hidden(loaded.bert, inputs))
    # The pooler is no part of a masked language model, so it is new here, and float.
    assert type(base.pooler.dense) is nn.Linear
    assert 0 < base.pooler.dense.weight.std() < 0.1
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "int8", num_labels=7)
    assert classifier(**inputs).logits.shape == (2, 7)
    assert classifier.classifier.weight.requires_grad


def result_hidden(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


def test_generates_and_compiles(tmp_path):
    loaded, inputs = int8_model(tmp_path)
    assert loaded.hf_quantizer.is_compileable
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    eager = loaded.generate(**prompt, **limits)
    loaded._compile_all_devices = True
    compile_config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled = loaded.generate(**prompt, **limits, cache_implementation="static", compile_config=compile_config)
    assert torch.equal(compiled, eager)


def test_the_backend_takes_a_loaded_model_whole(tmp_path):
    loaded, inputs = int8_model(tmp_path)
    with torch.no_grad():
        out = compile_eager(loaded)(**inputs).logits
    report = int8compile.last_report()
    assert report.summary() == "14 of 15 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)"
    assert not report.breaks
    assert (out - result(loaded, inputs)).norm() < 1e-2 * out.norm()


def test_memory_footprint_and_dequantize(tmp_path):
    loaded, inputs = int8_model(tmp_path)
    model, _ = float_model("Llama")
    weights = sum(s.in_features * s.out_features for s in loaded.hf_quantizer.report.sites if s.rewritten)
    channels = sum(s.out_features for s in loaded.hf_quantizer.report.sites if s.rewritten)
    assert model.get_memory_footprint() - loaded.get_memory_footprint() == 3 * weights - 4 * channels
    before = result(loaded, inputs)
    loaded.save_pretrained(tmp_path / "int8")
    loaded.dequantize()
    assert not any(isinstance(m, Int8Linear) for m in loaded.modules())
    assert (result(loaded, inputs) - before).norm() < 0.2 * before.norm()
    loaded.save_pretrained(tmp_path / "floats")
    again = load(model, tmp_path / "floats")
    assert torch.equal(result(again, inputs), result(loaded, inputs))


def test_copies_and_pickles(tmp_path):
    loaded, inputs = int8_model(tmp_path)
    for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert torch.equal(result(other, inputs), result(loaded, inputs))


def test_a_model_quantised_in_place_saves_as_one_loaded(tmp_path):
    model, inputs = float_model("GPT-2")
    quantize_(model, SMALL)
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(result(again, inputs), result(model, inputs))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(tmp_path, device_map):
    _, inputs = int8_model(tmp_path)
    config = Int8Config(**SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, device_map=device_map)
    assert torch.equal(result(model, inputs), result(int8_model(tmp_path)[0], inputs))


def test_a_process_that_does_not_know_us_fails_and_one_that_does_loads(tmp_path):
    loaded, _ = int8_model(tmp_path)
    loaded.save_pretrained(tmp_path / "int8")
    script = (
        "from transformers import AutoModelForCausalLM\n"
        "try:\n    AutoModelForCausalLM.from_pretrained('int8')\n"
        "except RuntimeError:\n    import int8compile.integrations.transformers\n"
        "    AutoModelForCausalLM.from_pretrained('int8')\n"
        "else:\n    raise SystemExit('loaded codes as floats')\n"
    )
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert re.search(r"layers\.0\.\w+\.\w+\.weight.*MISMATCH", run.stderr), run.stderr
    assert "int8compile" in run.stderr


def test_what_the_file_holds(tmp_path):
    loaded, _ = int8_model(tmp_path)
    loaded.save_pretrained(tmp_path / "int8")
    file = tmp_path / "int8" / "model.safetensors"
    entries = load_file(file)
    codes = {key: t for key, t in entries.items() if t.dtype == torch.int8}
    assert sorted(t.dim() for t in codes.values()) == [2] * 13 + [3]
    for key, tensor in codes.items():
        assert entries[f"{key}_scale"].dtype == torch.float32
        assert entries[f"{key}_scale"].shape == tensor.shape[:1]
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata()["int8compile"] == int8compile.__version__
    written = json.loads((tmp_path / "int8" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "int8compile"
    assert written["requires"] == "import int8compile.integrations.transformers"


def test_pickled_code_is_not_run(tmp_path):
    int8_model(tmp_path)
    with pytest.raises(OptionValueError, match="weights_only=False"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=Int8Config(**SMALL), weights_only=False
        )


def test_the_core_config_is_taken_too(tmp_path):
    model, inputs = float_model("Llama")
    model.save_pretrained(tmp_path / "float")
    options = {"min_features": 0, "llm_int8_threshold": 4.0}
    loaded = load(model, tmp_path / "float", quantization_config=int8compile.Int8Config(**options))
    want = load(model, tmp_path / "float", quantization_config=Int8Config(**options))
    assert loaded.hf_quantizer.report.rewritten == 14
    assert torch.equal(result(loaded, inputs), result(want, inputs))
    loaded.save_pretrained(tmp_path / "int8")
    assert torch.equal(result(load(model, tmp_path / "int8"), inputs), result(want, inputs))


def test_a_skip_pattern_that_names_nothing_is_warned_about_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="int8compile")
    loaded, _ = int8_model(tmp_path, llm_int8_skip_modules=["o_proj", "oo_proj"])
    assert "name no linear: oo_proj" in caplog.text
    assert loaded.hf_quantizer.report.unmatched == ["oo_proj"]
    caplog.clear()
    loaded.save_pretrained(tmp_path / "int8")
    load(loaded, tmp_path / "int8")
    assert "name no linear" not in caplog.text


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("labels", [12, 20])
def test_a_head_of_another_size_is_new_where_that_is_allowed(tmp_path, caplog, quantised, labels):
    config = copy.deepcopy(ENTRIES["BERT"].make()[0].config)
    config.num_labels = 16
    family = transformers.BertForSequenceClassification
    family(config).save_pretrained(tmp_path / "from")
    given = {"quantization_config": Int8Config(min_features=15)}
    if quantised:
        family.from_pretrained(tmp_path / "from", **given).save_pretrained(tmp_path / "int8")
    source, given = (tmp_path / "int8", {}) if quantised else (tmp_path / "from", given)
    model = family.from_pretrained(source, num_labels=labels, ignore_mismatched_sizes=True, **given)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad
    assert 0 < model.classifier.weight.std() < 0.1
    assert model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits.shape == (1, labels)
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == model.hf_quantizer.report.rewritten == 13
    caplog.set_level(logging.WARNING, logger="transformers")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.from_pretrained(source, num_labels=labels, **given)
    assert "classifier.weight" in caplog.text
    model.save_pretrained(tmp_path / "again")  # and the float head is kept from then on
    again = family.from_pretrained(tmp_path / "again")
    assert torch.equal(again.classifier.weight, model.classifier.weight)


def test_a_calibration_goes_with_a_checkpoint(tmp_path):
    model, inputs = float_model("Llama")
    model.save_pretrained(tmp_path / "float")
    with torch.no_grad():  # tiny weights have no outliers: every linear is to have some columns
        path = int8compile.calibrate(model, [inputs], budget=0.1, config=SMALL).save(tmp_path / "float")
    loaded, _ = int8_model(tmp_path, calibration=str(path))
    loaded.save_pretrained(tmp_path / "int8")
    again = load(model, tmp_path / "int8")
    quantize_(model, {"calibration": path, **SMALL})
    assert any(isinstance(m, Int8Linear) and m.outlier_policy == "calibrated" for m in again.modules())
    want = result(model, inputs)
    assert torch.equal(result(loaded, inputs), want)
    assert torch.equal(result(again, inputs), want)
