"""Modules that accelerate keeps on the CPU or the disk between calls: int8 there as well, saved and refused rightly."""

import accelerate
import pytest
import torch
from model_zoo import ZOO, output
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from int8compile import Int8Experts, Int8Linear, Reason, dequantize_, quantize_
from int8compile.errors import ModuleError
from int8compile.integrations.transformers import Int8Config, save_pretrained
from int8compile.modules.places import is_offloaded
from int8compile.weights.formats import FORMATS

LLAMA = next(entry for entry in ZOO if entry.name == "Llama")
CPU = torch.device("cpu")
CONFIG = Int8Config(min_features=0, llm_int8_enable_fp32_cpu_offload=True)
SPLIT = {f"model.{name}": "cpu" for name in ("embed_tokens", "layers.0", "norm", "rotary_emb")}
SPLIT |= {"lm_head": "cpu", "model.layers.1": "disk"}


@pytest.fixture
def saved(tmp_path):
    """Folders with a float and an int8 model, that int8 model in memory, and inputs."""
    model, inputs = LLAMA.make()
    model.requires_grad_(False).save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    loaded.save_pretrained(tmp_path / "int8")
    return tmp_path, loaded, inputs


def offloaded(folder, device_map=SPLIT):
    where = {"device_map": device_map, "offload_folder": folder / "offload", "offload_buffers": True}
    return AutoModelForCausalLM.from_pretrained(folder / "int8", **where)


def result(model, inputs):
    with torch.no_grad():
        return output(model(**inputs))


WAYS = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: accelerate.disk_offload(
        model, folder / "offload", execution_device=CPU, offload_buffers=True
    ),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, SPLIT, main_device="cpu", offload_dir=folder / "offload", offload_buffers=True
    ),
    "from_pretrained": lambda model, folder: offloaded(folder),
    "all on the disk": lambda model, folder: offloaded(folder, {"": "disk"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_is_int8_where_it_waits_and_computes_the_same(saved, way):
    folder, loaded, inputs = saved
    expected = result(loaded, inputs)
    model = WAYS[way](loaded, folder)
    for _ in range(2):
        assert torch.equal(result(model, inputs), expected)
    waiting = {path: m for path, m in model.named_modules() if isinstance(m, Int8Linear) and is_offloaded(m)}
    assert len(waiting) == (7 if SPLIT in (getattr(model, "hf_device_map", None),) else 14)
    for module in waiting.values():
        assert module.weight.is_meta
        assert module.weight_scale.is_meta
        assert module._hf_hook.weights_map["weight"].dtype == torch.int8
        assert module._hf_hook.weights_map["weight_scale"].dtype == torch.float32


@pytest.mark.parametrize("device_map", [SPLIT, {"": "disk"}], ids=["split", "disk"])
@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_wait_in_int8_and_are_saved(tmp_path, name, device_map):
    model, inputs = next(entry for entry in ZOO if entry.name == name).make()
    model.requires_grad_(False).save_pretrained(tmp_path / "float")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    loaded.save_pretrained(tmp_path / "int8")
    model = offloaded(tmp_path, device_map)
    assert torch.equal(result(model, inputs), result(loaded, inputs))
    waiting = [m for m in model.modules() if isinstance(m, Int8Experts) and is_offloaded(m)]
    assert len(waiting) == (1 if device_map is SPLIT else 2)
    assert all(m.down_proj.is_meta and m._hf_hook.weights_map["down_proj"].dtype == torch.int8 for m in waiting)
    with pytest.raises(ModuleError, match="is offloaded"):
        dequantize_(model)
    for format in FORMATS:
        save_pretrained(loaded, tmp_path / "whole", format=format)
        with pytest.warns(UserWarning, match="offloaded modules"):
            save_pretrained(model, tmp_path / "parts", format=format)
        whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
        assert whole.keys() == parts.keys()
        assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("device_map", [SPLIT, {"": "disk"}], ids=["split", "disk"])
@pytest.mark.parametrize("format", FORMATS)
def test_saves_the_files_that_the_whole_model_saves(saved, device_map, format):
    folder, loaded, _ = saved
    save_pretrained(loaded, folder / "whole", format=format)
    with pytest.warns(UserWarning, match="offloaded modules"):
        save_pretrained(offloaded(folder, device_map), folder / "parts", format=format)
    whole, parts = (load_file(folder / name / "model.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) and whole[key].dtype == parts[key].dtype for key in whole)
    assert (folder / "whole" / "config.json").read_text() == (folder / "parts" / "config.json").read_text()


def test_reasons_are_those_of_the_model_not_of_where_it_is(saved):
    folder, loaded, _ = saved
    reasons = [(site.path, site.reason) for site in loaded.hf_quantizer.report.sites]
    assert [(site.path, site.reason) for site in offloaded(folder).hf_quantizer.report.sites] == reasons


def test_what_would_need_the_weights_is_refused(saved):
    folder, _, inputs = saved
    model = offloaded(folder)
    before = result(model, inputs)
    with pytest.raises(ModuleError, match=r"model\.layers\.1\.\S+ is offloaded by accelerate; load the model without"):
        dequantize_(model)
    assert torch.equal(result(model, inputs), before)
    plain = AutoModelForCausalLM.from_pretrained(folder / "float")
    plain = accelerate.cpu_offload(plain, CPU)
    report = quantize_(plain, {"min_features": 0})
    assert {site.reason for site in report.sites} == {Reason.CUSTOM, Reason.OUTPUT_EMBEDDING}
    assert "offloaded by accelerate" in {site.detail for site in report.sites}


def test_a_model_spread_over_devices_is_quantised_in_place_with_its_hooks(saved):
    folder, loaded, inputs = saved
    plain = AutoModelForCausalLM.from_pretrained(folder / "float")
    plain = accelerate.dispatch_model(plain, {"": "cpu"}, main_device="cpu", force_hooks=True)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook(CPU))
    assert quantize_(plain, {"min_features": 0}).rewritten == 14
    layer = plain.model.layers[0].mlp.up_proj
    assert isinstance(layer, Int8Linear)
    assert layer._hf_hook.execution_device == CPU
    assert torch.equal(result(plain, inputs), result(loaded, inputs))
    dequantize_(plain)
    assert plain.model.layers[0].mlp.up_proj._hf_hook.execution_device == CPU


def test_offload_is_asked_for_and_from_int8_checkpoints_only(saved):
    folder, _, _ = saved
    where = {"device_map": SPLIT, "offload_folder": folder / "offload", "offload_buffers": True}
    with pytest.raises(ValueError, match="from an int8 checkpoint only"):
        AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=CONFIG, **where)
    with pytest.raises(ValueError, match="llm_int8_enable_fp32_cpu_offload=True"):
        AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=Int8Config(), **where)
    with pytest.raises(ValueError, match="pass offload_buffers=True"):
        AutoModelForCausalLM.from_pretrained(folder / "int8", **{**where, "offload_buffers": False})
