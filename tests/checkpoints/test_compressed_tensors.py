"""The compressed-tensors format, which vLLM and SGLang serve, read back with the compressed-tensors package."""

import json

import pytest
import torch
from model_zoo import ZOO
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from int8compile import Int8Linear, quantize_
from int8compile.errors import OptionValueError
from int8compile.integrations.transformers import save_pretrained

ENTRIES = {entry.name: entry for entry in ZOO}


def saved(tmp_path, name="Llama"):
    model, inputs = ENTRIES[name].make()
    quantize_(model.requires_grad_(False), {"min_features": 0, "llm_int8_threshold": 0})
    save_pretrained(model, tmp_path, format="compressed-tensors")
    return model, inputs


def test_the_format(tmp_path):
    model, _ = saved(tmp_path)
    entries = load_file(tmp_path / "model.safetensors")
    for path, module in model.named_modules():
        if isinstance(module, Int8Linear):
            assert torch.equal(entries[f"{path}.weight"], module.weight)
            assert torch.equal(entries[f"{path}.weight_scale"], module.weight_scale.unsqueeze(1))
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (written["quant_method"], written["format"]) == ("compressed-tensors", "int-quantized")
    assert written["ignore"] == ["lm_head"]
    assert model.config.quantization_config.quant_method == "int8compile"


def test_the_package_reads_the_same_weights(tmp_path):
    pytest.importorskip("compressed_tensors")
    model, inputs = saved(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        out, want = theirs(**inputs).logits, model(**inputs).logits
    # Its int8 has 255 steps to our 254, so that the activations' codes differ.
    assert (out - want).norm() < 0.06 * want.norm()
    for path, module in model.named_modules():
        if isinstance(module, Int8Linear):  # its first forward made floats of them
            torch.testing.assert_close(theirs.get_submodule(path).weight, module.dequantize())


def test_conv1d_is_refused(tmp_path):
    with pytest.raises(OptionValueError, match="knows no Conv1D"):
        saved(tmp_path, "GPT-2")
    assert not list(tmp_path.iterdir())
