"""Experts of transformers' models in checkpoints: formats, float and int8 side by side, old files, planted ones."""

import json
import logging
import re
from types import SimpleNamespace

import pytest
import torch
from model_zoo import ZOO, output
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import MergeModulelist

from int8compile import Int8Experts, Int8Linear, Reason, dequantize_, quantize_
from int8compile.checkpoints.convert import quantize_folder
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.integrations.transformers import Int8Config, Int8Quantizer, save_pretrained
from int8compile.weights.formats import FORMATS

ENTRIES = {entry.name: entry for entry in ZOO}
SMALL = {"min_features": 0}
CONFIG = Int8Config(**SMALL)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, logger="transformers")


def float_folder(tmp_path, name="Mixtral"):
    model, inputs = ENTRIES[name].make()
    model.requires_grad_(False).save_pretrained(tmp_path / "float")
    return model, inputs


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def saved(tmp_path, name="Mixtral", **options):
    """A float model, one that was quantised while loading and saved in "int8", and inputs."""
    model, inputs = float_folder(tmp_path, name)
    loaded = load(tmp_path / "float", quantization_config=Int8Config(**SMALL, **options))
    loaded.save_pretrained(tmp_path / "int8")
    return model, loaded, inputs


def run(model, inputs):
    with torch.no_grad():
        return output(model(**inputs))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def entries_of(folder):
    return load_file(folder / "model.safetensors")


def change(folder, **entries):
    """Write a checkpoint's file anew with entries by the ends of their names; None leaves one out."""
    state = entries_of(folder)
    for ending, entry in entries.items():
        names = [name for name in state if name.endswith(ending.replace("__", "."))]
        assert names, ending
        for name in names:
            new = entry(state.pop(name))
            if new is not None:
                state[name] = new.contiguous()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def set_options(folder, **options):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= options
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_what_streaming_writes(tmp_path, name, format):
    _, loaded, _ = saved(tmp_path, name)
    save_pretrained(loaded, tmp_path / "saved", format=format)
    done = quantize_folder(tmp_path / "float", tmp_path / "streamed", CONFIG, format)
    streamed, whole = entries_of(tmp_path / "streamed"), entries_of(tmp_path / "saved")
    if format != "int8compile":  # an int8 model has lost the floats that others keep
        floats = [key for key, t in whole.items() if "experts" in key and t.dim() > 1 and t.dtype == torch.float32]
        floats = [key for key in floats if not key.endswith(("_scale", "_bias"))]
        assert len(floats) == 0 or format == "bitsandbytes" or name == "gpt-oss"
        for key in floats:
            torch.testing.assert_close(streamed.pop(key), whole.pop(key), rtol=0, atol=0.02)
    assert same(streamed, whole)
    read = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("streamed", "saved")]
    assert read[0]["quantization_config"] == read[1]["quantization_config"]
    in_int8 = format == "int8compile" or (format == "compressed-tensors" and name != "gpt-oss")
    assert {s.reason for s in done.sites if s.experts} == {Reason.REWRITTEN if in_int8 else Reason.SKIPPED}


def test_names_and_shapes_in_the_file(tmp_path):
    saved(tmp_path)
    entries = entries_of(tmp_path / "int8")
    one = {
        k.partition("experts.3.")[2]: (t.dtype, tuple(t.shape))
        for k, t in entries.items()
        if "0.block_sparse_moe.experts.3." in k
    }
    assert one == {
        "w1.weight": (torch.int8, (64, 32)),
        "w1.weight_scale": (torch.float32, (64,)),
        "w2.weight": (torch.int8, (32, 64)),
        "w2.weight_scale": (torch.float32, (32,)),
        "w3.weight": (torch.int8, (64, 32)),
        "w3.weight_scale": (torch.float32, (64,)),
    }


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.parametrize("skipped", ["experts.down_proj", "layers.1.mlp.experts", "experts", "self_attn"])
def test_float_beside_int8(tmp_path, name, skipped):
    model, loaded, inputs = saved(tmp_path, name, llm_int8_skip_modules=[skipped])
    quantize_(model, {**SMALL, "llm_int8_skip_modules": [skipped]})
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    again = load(tmp_path / "int8")
    assert torch.equal(run(again, inputs), run(loaded, inputs))
    assert same(again.state_dict(), loaded.state_dict())
    quantize_folder(tmp_path / "float", tmp_path / "streamed", Int8Config(**SMALL, llm_int8_skip_modules=[skipped]))
    assert same(entries_of(tmp_path / "streamed"), entries_of(tmp_path / "int8"))


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
@pytest.mark.parametrize("skipped", ["experts", "experts.down_proj"])
def test_the_file_decides_what_is_int8(tmp_path, name, skipped):
    """As in checkpoints from before experts could be int8, whose options do not say that they are not."""
    _, loaded, inputs = saved(tmp_path, name, llm_int8_skip_modules=[skipped])
    set_options(tmp_path / "int8", llm_int8_skip_modules=[])
    again, info = load(tmp_path / "int8", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(run(again, inputs), run(loaded, inputs))
    assert same(again.state_dict(), loaded.state_dict())
    assert [type(m) for m in again.modules()] == [type(m) for m in loaded.modules()]
    details = {site.detail for site in again.hf_quantizer.report.sites if site.experts and not site.rewritten}
    assert details == {"float in the checkpoint"}
    again.save_pretrained(tmp_path / "again")
    assert same(entries_of(tmp_path / "again"), entries_of(tmp_path / "int8"))


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_int8_in_the_file_though_the_options_skip_it(tmp_path, name):
    _, loaded, inputs = saved(tmp_path, name)
    set_options(tmp_path / "int8", llm_int8_skip_modules=["experts"])
    again = load(tmp_path / "int8")
    assert torch.equal(run(again, inputs), run(loaded, inputs))
    assert sum(isinstance(m, Int8Experts) for m in again.modules()) == 2


def test_files_that_keep_experts_as_the_model_does(tmp_path):
    model, loaded, inputs = saved(tmp_path)
    want = run(loaded, inputs)
    loaded.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert "model.layers.0.mlp.experts.down_proj_scale" in entries_of(tmp_path / "stacked")
    assert torch.equal(run(load(tmp_path / "stacked"), inputs), want)
    model.save_pretrained(tmp_path / "float_stacked", save_original_format=False)
    from_stacked = load(tmp_path / "float_stacked", quantization_config=CONFIG)
    assert torch.equal(run(from_stacked, inputs), want)
    quantize_folder(tmp_path / "float_stacked", tmp_path / "streamed", CONFIG)
    assert torch.equal(run(load(tmp_path / "streamed"), inputs), want)
    for again in (from_stacked, load(tmp_path / "stacked")):
        save_pretrained(again, tmp_path / "single", format="compressed-tensors")
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight_scale" in entries_of(tmp_path / "single")


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_alone_are_marked_as_no_floats(tmp_path, name):
    _, loaded, inputs = saved(tmp_path, name, llm_int8_skip_modules=["self_attn"])
    marked = [
        t for t in entries_of(tmp_path / "int8").values() if t.dtype == torch.int8 and t.dim() > 2 and t.shape[-1] == 1
    ]
    assert len(marked) == (1 if name == "gpt-oss" else 8)
    set_options(tmp_path / "int8", quant_method="int8compile")
    assert torch.equal(run(load(tmp_path / "int8"), inputs), run(loaded, inputs))


@pytest.mark.parametrize(
    ("entry", "planted", "message"),
    [
        ("experts.2.w1.weight_scale", lambda t: None, r"gate_up_proj_scale is torch.float32 \[3, 64\]|stack|Sizes"),
        ("experts.2.w2.weight_scale", lambda t: None, r"down_proj_scale is torch.float32 \[3, 32\]"),
        ("w2.weight_scale", lambda t: None, "down_proj_scale is missing beside the int8"),
        ("w2.weight_scale", lambda t: t.half(), "down_proj_scale is torch.float16"),
        ("experts.1.w2.weight", lambda t: t.float(), "down_proj is torch.float32 for some experts"),
        ("w2.weight", lambda t: t.float(), "down_proj is torch.float32 for some experts"),
        ("experts.1.w2.weight", lambda t: None, r"down_proj is int8 \[3, 32, 64\]"),
        ("w2.weight", lambda t: t[:16], r"down_proj is int8 \[4, 16, 64\]"),
        ("w2.weight", lambda t: t.t(), r"down_proj is int8 \[4, 64, 32\]"),
    ],
)
def test_planted_entries_are_refused(tmp_path, caplog, entry, planted, message):
    saved(tmp_path)
    change(tmp_path / "int8", **{entry.replace(".", "__"): planted})
    with caplog.at_level("WARNING", logger="transformers"), pytest.raises(RuntimeError, match="CONVERSION"):
        load(tmp_path / "int8")
    assert re.search(message, caplog.text)


@pytest.mark.parametrize(
    ("entry", "planted", "message"),
    [
        ("experts.down_proj_scale", lambda t: None, "down_proj_scale is missing beside the int8"),
        ("experts.down_proj", lambda t: None, "down_proj is missing"),
        ("experts.down_proj", lambda t: t.float(), "down_proj is torch.float32 for some experts"),
        ("experts.down_proj", lambda t: t.mT, r"down_proj is int8 \[4, 64, 32\]"),
        ("experts.down_proj_scale", lambda t: t.half(), "down_proj_scale is torch.float16"),
    ],
)
def test_planted_stacked_entries_are_refused(tmp_path, caplog, entry, planted, message):
    saved(tmp_path, "gpt-oss")
    change(tmp_path / "int8", **{entry.replace(".", "__"): planted})
    with caplog.at_level("WARNING", logger="transformers"), pytest.raises(RuntimeError, match="CONVERSION"):
        load(tmp_path / "int8")
    assert re.search(message, caplog.text)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_that_the_float_checkpoint_lacks_are_new_floats(tmp_path, name):
    float_folder(tmp_path, name)
    state = {k: t for k, t in entries_of(tmp_path / "float").items() if "layers.1" not in k or "experts" not in k}
    save_file(state, tmp_path / "float" / "model.safetensors", metadata={"format": "pt"})
    loaded = load(tmp_path / "float", quantization_config=CONFIG)
    first, second = (layer.mlp.experts for layer in loaded.model.layers)
    assert isinstance(first, Int8Experts)
    assert not isinstance(second, Int8Experts)
    assert second.down_proj.dtype == torch.float32
    assert second.down_proj.isfinite().all()
    assert 0 < second.down_proj.std() < 1


@pytest.mark.parametrize("lost", ["experts.down_proj", "experts.down_proj_bias", "experts.gate_up_proj"])
def test_experts_of_which_a_part_is_missing_are_refused(tmp_path, lost):
    float_folder(tmp_path, "gpt-oss")
    change(tmp_path / "float", **{lost.replace(".", "__"): lambda t: None})
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        load(tmp_path / "float", quantization_config=CONFIG)


def test_other_numbers_of_experts(tmp_path):
    model, inputs = float_folder(tmp_path, "Mixtral")
    config = AutoConfig.from_pretrained(tmp_path / "float", num_local_experts=3)
    given = {"config": config, "quantization_config": CONFIG}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path / "float", **given)
    loaded = load(tmp_path / "float", ignore_mismatched_sizes=True, **given)
    experts = loaded.model.layers[0].mlp.experts
    assert type(experts) is type(model.model.layers[0].mlp.experts)
    assert (experts.down_proj.shape, experts.down_proj.dtype) == ((3, 32, 64), torch.float32)
    assert run(loaded, inputs).isfinite().all()


def test_experts_that_are_there_twice_are_refused(tmp_path, caplog):
    _, loaded, _ = saved(tmp_path)
    state = entries_of(tmp_path / "int8")
    for name in ("down_proj", "down_proj_scale"):
        entry = getattr(loaded.model.layers[0].mlp.experts, name)
        state[f"model.layers.0.block_sparse_moe.experts.{name}"] = entry.clone()
    save_file(state, tmp_path / "int8" / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level("WARNING", logger="transformers"), pytest.raises(RuntimeError, match="CONVERSION"):
        load(tmp_path / "int8")
    assert "down_proj is there twice" in caplog.text


def test_sixteen_bits_and_a_dequantised_model(tmp_path):
    model, inputs = ENTRIES["gpt-oss"].make()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "float")
    loaded = load(tmp_path / "float", quantization_config=CONFIG)
    experts = loaded.model.layers[0].mlp.experts
    assert (experts.float_dtype, experts.down_proj_scale.dtype) == (torch.bfloat16, torch.float32)
    loaded.save_pretrained(tmp_path / "int8")
    again = load(tmp_path / "int8")
    assert torch.equal(run(again, inputs), run(loaded, inputs))
    again.dequantize()
    again.save_pretrained(tmp_path / "back")
    assert entries_of(tmp_path / "back").keys() == entries_of(tmp_path / "float").keys()
    assert load(tmp_path / "back").model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16


def test_a_dequantised_model_is_saved_as_the_float_one(tmp_path):
    _, loaded, inputs = saved(tmp_path)
    want = run(loaded, inputs)
    dequantize_(loaded)
    assert not [m for m in loaded.modules() if isinstance(m, (Int8Experts, Int8Linear))]
    loaded.hf_quantizer.remove_quantization_config(loaded)
    loaded.save_pretrained(tmp_path / "back")
    assert entries_of(tmp_path / "back").keys() == entries_of(tmp_path / "float").keys()
    out = run(load(tmp_path / "back"), inputs)
    assert (out - want).norm() < 0.1 * want.norm()


class TestCompressedTensors:
    def saved(self, tmp_path, name="Qwen3-MoE", **options):
        model, _ = ENTRIES[name].make()
        quantize_(model.requires_grad_(False), {**SMALL, "llm_int8_threshold": 0, **options})
        save_pretrained(model, tmp_path / "ct", format="compressed-tensors")
        config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
        return model, entries_of(tmp_path / "ct"), config

    @pytest.mark.parametrize(("name", "router"), [("Qwen3-MoE", "mlp.gate"), ("Mixtral", "block_sparse_moe.gate")])
    def test_each_expert_has_linears_of_its_own(self, tmp_path, name, router):
        model, entries, config = self.saved(tmp_path, name)
        first, second = ("gate_proj", "down_proj") if name == "Qwen3-MoE" else ("w1", "w2")
        experts = model.model.layers[1].mlp.experts
        half = experts.gate_up_proj.shape[1] // 2
        prefix = f"model.layers.1.{router.partition('.')[0]}.experts.3"
        assert torch.equal(entries[f"{prefix}.{first}.weight"], experts.gate_up_proj[3, :half])
        scale = experts.gate_up_proj_scale[3, :half].unsqueeze(1)
        assert torch.equal(entries[f"{prefix}.{first}.weight_scale"], scale)
        assert torch.equal(entries[f"{prefix}.{second}.weight"], experts.down_proj[3])
        assert config["ignore"] == ["lm_head", *(f"model.layers.{layer}.{router}" for layer in (0, 1))]

    @pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "DeepSeek-V3"])
    def test_the_package_reads_the_same_weights(self, tmp_path, name):
        compressors = pytest.importorskip("compressed_tensors.compressors")
        quantization = pytest.importorskip("compressed_tensors.quantization")
        model, entries, written = self.saved(tmp_path, name)
        config = quantization.QuantizationConfig.model_validate(written)
        scheme = config.config_groups["group_0"]
        compressor = compressors.BaseCompressor.get_value_from_registry(config.format)
        dequantize_(model)
        model.save_pretrained(tmp_path / "float")
        want = entries_of(tmp_path / "float")
        experts = [key for key in entries if ".experts." in key and key.endswith(".weight")]
        assert len(experts) == sum(".experts." in key for key in want) > 0
        for key in experts:
            given = {"weight": entries[key], "weight_scale": entries[f"{key}_scale"]}
            torch.testing.assert_close(compressor.decompress(given, scheme)["weight"], want[key])

    def test_experts_without_such_a_form_are_written_in_float(self, tmp_path):
        model, entries, config = self.saved(tmp_path, "gpt-oss")
        assert entries["model.layers.0.mlp.experts.down_proj"].dtype == torch.float32
        assert torch.equal(
            entries["model.layers.0.mlp.experts.down_proj"], model.model.layers[0].mlp.experts.dequantize("down_proj")
        )
        assert r"re:^model\.layers\.0\.mlp\.experts\..*" in config["ignore"]

    def test_a_layer_is_int8_as_a_whole_or_not_at_all(self, tmp_path):
        _, entries, config = self.saved(tmp_path, llm_int8_skip_modules=["layers.0.mlp.experts.down_proj"])
        kinds = {
            key.split(".")[2]: t.dtype for key, t in entries.items() if ".experts." in key and key.endswith(".weight")
        }
        assert kinds == {"0": torch.float32, "1": torch.int8}
        assert [name for name in config["ignore"] if name.startswith("re:")] == [
            r"re:^model\.layers\.0\.mlp\.experts\..*"
        ]

    def test_nothing_left_in_int8_is_refused(self, tmp_path):
        model, _ = ENTRIES["gpt-oss"].make()
        quantize_(model, {**SMALL, "llm_int8_skip_modules": ["self_attn"]})
        with pytest.raises(OptionValueError, match="are float, all there are"):
            save_pretrained(model, tmp_path / "ct", format="compressed-tensors")
        assert not (tmp_path / "ct").exists()


def test_tied_experts_stay_float(tmp_path):
    model, _ = ENTRIES["Mixtral"].make()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    model.all_tied_weights_keys = {
        **model.all_tied_weights_keys,
        "model.layers.1.mlp.experts.down_proj": "model.layers.0.mlp.experts.down_proj",
    }
    report = quantize_(model, {**SMALL})
    reasons = {site.path.rpartition(".")[2]: site.reason for site in report.sites if site.experts}
    assert reasons["gate_up_proj"] is Reason.REWRITTEN
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, nn.Parameter)
    assert model.model.layers[1].mlp.experts.down_proj is model.model.layers[0].mlp.experts.down_proj


@pytest.mark.parametrize("size", ["tp_size", "ep_size"])
def test_experts_are_not_split_between_processes(tmp_path, monkeypatch, size):
    """Transformers would add up what each process computes, and each computes all of it."""
    float_folder(tmp_path)
    prepared = Int8Quantizer._process_model_before_weight_loading

    def distributed(self, model, **kwargs):
        prepared(self, model, **kwargs)
        model.config.distributed_config = SimpleNamespace(**{size: 2})

    monkeypatch.setattr(Int8Quantizer, "_process_model_before_weight_loading", distributed)
    with pytest.raises(ValueError, match=f"{size}=2 splits experts between processes"):
        load(tmp_path / "float", quantization_config=CONFIG)
    skipped = Int8Config(**SMALL, llm_int8_skip_modules=["experts"])
    assert load(tmp_path / "float", quantization_config=skipped).hf_quantizer.report.rewritten == 8


def test_float_stacks_of_experts_are_never_made(tmp_path, monkeypatch):
    model, inputs = float_folder(tmp_path)
    quantize_(model, SMALL)

    def convert(self, *args, **kwargs):
        raise AssertionError("a stack of floats")

    with monkeypatch.context() as patch:
        patch.setattr(MergeModulelist, "convert", convert)
        loaded = load(tmp_path / "float", quantization_config=CONFIG)
    assert torch.equal(run(loaded, inputs), run(model, inputs))
