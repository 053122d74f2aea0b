"""bitsandbytes' int8 checkpoints and configurations, read and written without it, and checked against it."""

import importlib.util
import json
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import ZOO, output
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.studies import bitsandbytes_checkpoint
from int8compile import Int8Linear, quantize_
from int8compile.errors import OptionValueError
from int8compile.integrations.transformers import save_pretrained, take_over_bitsandbytes
from int8compile.weights.formats import absmax_of

ENTRIES = {entry.name: entry for entry in ZOO}


@pytest.fixture
def taken_over():
    take_over_bitsandbytes()
    yield
    take_over_bitsandbytes(False)


@pytest.fixture(params=["Llama", "GPT-2"])
def saved(request, tmp_path):
    """An int8 model saved in bitsandbytes' format, its inputs and its logits."""
    model, inputs = ENTRIES[request.param].make()
    quantize_(model.requires_grad_(False), {"min_features": 0})
    save_pretrained(model, tmp_path / "bnb", format="bitsandbytes")
    return tmp_path / "bnb", model, inputs


def logits(model, inputs):
    with torch.no_grad():
        return output(model(**inputs))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_absmax_gives_the_scale_back_to_the_bit(absmax):
    scale = torch.tensor([absmax]) / 127.0
    assert torch.equal(absmax_of(scale) / 127.0, scale)
    assert absmax_of(torch.zeros(1)).item() == 0


def test_the_format(saved):
    folder, model, _ = saved
    entries = load_file(folder / "model.safetensors")
    paths = [path for path, module in model.named_modules() if isinstance(module, Int8Linear)]
    assert paths
    for path in paths:
        assert entries[f"{path}.weight"].dtype == torch.int8
        assert tuple(entries[f"{path}.weight"].shape) == tuple(model.get_submodule(path).weight.shape)
        assert entries[f"{path}.SCB"].dtype == torch.float32
        assert (entries[f"{path}.weight_format"].dtype, entries[f"{path}.weight_format"].item()) == (torch.uint8, 0)
        assert f"{path}.weight_scale" not in entries
    written = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert written["load_in_8bit"]
    assert written["quant_method"] == "bitsandbytes"
    assert "lm_head" in written["llm_int8_skip_modules"]


def test_loads_without_bitsandbytes_to_the_bit(saved, taken_over, tmp_path):
    folder, model, inputs = saved
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    assert loaded.hf_quantizer.report.rewritten == sum(isinstance(m, Int8Linear) for m in model.modules())
    loaded.save_pretrained(tmp_path / "ours")
    take_over_bitsandbytes(False)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), inputs), logits(model, inputs))


def test_a_bitsandbytes_config_is_honoured(taken_over, tmp_path):
    model, inputs = ENTRIES["Llama"].make()
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0, llm_int8_skip_modules=["mlp"])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    # All of the zoo's linears are smaller than min_features, which bitsandbytes does not have.
    assert loaded.hf_quantizer.config.llm_int8_threshold == 5.0
    assert loaded.hf_quantizer.config.llm_int8_skip_modules == ("mlp",)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_not_taken_over_it_is_bitsandbytes_own(saved):
    with pytest.raises(ImportError, match="bitsandbytes"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def spoil(folder, **changes):
    """Rewrite entries of the file; None removes one."""
    entries = load_file(folder / "model.safetensors")
    key = next(k for k in entries if k.endswith(".SCB")).removesuffix("SCB")
    for name, change in changes.items():
        value = entries.pop(key + name)
        if change is not None:
            entries[key + name] = change(value)
    save_file(entries, folder / "model.safetensors", metadata={"format": "pt"})
    return key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SCB": None}, "weight_scale is missing beside the int8"),
        ({"SCB": lambda t: t[:-1].clone()}, "expected float32"),
        ({"weight": lambda t: t[:, :-1].contiguous()}, "MISMATCH"),
        ({"weight_format": lambda t: t + 2}, "a layout of old bitsandbytes"),
        ({"weight": lambda t: t.float()}, "expected int8"),
    ],
)
def test_spoilt_checkpoints_are_refused_by_key(saved, taken_over, changes, message, caplog):
    folder = saved[0]
    key = spoil(folder, **changes)
    with caplog.at_level("WARNING", logger="transformers"), pytest.raises(RuntimeError, match=r"CONVERSION|mismatched"):
        AutoModelForCausalLM.from_pretrained(folder)
    text = capture_of(caplog)
    assert message in text
    assert key in text


def capture_of(caplog) -> str:
    return " ".join(record.getMessage() for record in caplog.records)


def test_a_truncated_file_is_an_error(saved, taken_over):
    file = saved[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header|bounds"):
        AutoModelForCausalLM.from_pretrained(saved[0])


def test_unknown_formats_and_float_models_are_refused(saved, tmp_path):
    with pytest.raises(OptionValueError, match="format='gguf'"):
        save_pretrained(saved[1], tmp_path / "x", format="gguf")
    model, _ = ENTRIES["Llama"].make()
    with pytest.raises(OptionValueError, match="given to quantize_"):
        save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_bitsandbytes_reads_what_we_write(saved):
    pytest.importorskip("bitsandbytes")
    folder, model, inputs = saved
    theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert not any(isinstance(m, Int8Linear) for m in theirs.modules())
    out, want = logits(theirs, inputs), logits(model, inputs)
    assert (out - want).norm() < 0.02 * want.norm()


def test_we_read_what_bitsandbytes_writes(tmp_path, saved):
    pytest.importorskip("bitsandbytes")
    _, model, inputs = saved
    name = "GPT-2" if model.config.model_type == "gpt2" else "Llama"
    ENTRIES[name].make()[0].save_pretrained(tmp_path / "float")
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu")
    theirs.save_pretrained(tmp_path / "theirs")
    take_over_bitsandbytes()
    try:
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    finally:
        take_over_bitsandbytes(False)
    assert ours.hf_quantizer.report.rewritten == sum(isinstance(m, Int8Linear) for m in model.modules())
    entries = load_file(tmp_path / "theirs" / "model.safetensors")
    for path, module in ours.named_modules():
        if isinstance(module, Int8Linear):
            assert torch.equal(module.weight, entries[f"{path}.weight"])
            assert torch.equal(module.weight_scale, entries[f"{path}.SCB"] / 127)
    out, want = logits(ours, inputs), logits(theirs, inputs)
    assert (out - want).norm() < 0.02 * want.norm()


@pytest.fixture
def log_levels():
    """Benchmarks quieten the libraries that they time, for the whole process."""
    levels = {name: logging.getLogger(name).level for name in ("torch", "torchao", "bitsandbytes")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.usefixtures("log_levels")
@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_their_cast_and_a_constant_are_all_that_is_between_us(tmp_path, name):
    pytest.importorskip("bitsandbytes")
    ENTRIES[name].make()[0].save_pretrained(tmp_path)
    theirs, ours = bitsandbytes_checkpoint.load_both(str(tmp_path), threshold=3.0)
    with torch.no_grad():
        layers = bitsandbytes_checkpoint.compare_layers(theirs, ours, list(range(32)))
    with_cast = layers["with bitsandbytes' cast"]
    assert with_cast.count == sum(isinstance(m, Int8Linear) for m in ours.modules()) > 0
    assert with_cast.codes == 0
    assert with_cast.worst < 2.5e-5  # 1.8e-5 of it by 6.200124e-05, where 1 / 127**2 is 6.200012e-05
    assert layers["as it is"].codes > 0
    assert layers["as it is"].worst < 0.02
