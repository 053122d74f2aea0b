"""What ``benchmarks.accuracy`` makes of its measurements, on a tiny model of random weights."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import accuracy


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=4, **shape)).eval().requires_grad_(False)
    model.model.layers[0].input_layernorm.weight[3] = 60.0
    return model


def test_forms_are_measured_against_float(tiny):
    text = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    measure = accuracy.Measure(tiny, text, text[:1, :4], tokens=8)
    with torch.no_grad():
        results = {name: measure(accuracy.forms({})[name](clone(tiny))) for name in ("float32", "none", "column, 6.0")}
    for result in results.values():
        accuracy.summarize(result, results["float32"])
    exact, none, column = results.values()
    assert (exact["change"], exact["divergence"], exact["top_1"], exact["same_tokens"]) == (0.0, 0.0, 1.0, 8.0)
    assert none["divergence"] > 3 * column["divergence"] > 0
    assert none["divergence_interval"][0] <= none["divergence"] <= none["divergence_interval"][1]
    assert exact["chaos"] < 1e-5
    json.dumps(results)


def clone(model):
    made = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    made.load_state_dict(model.state_dict())
    return made


def test_the_text_of_calibrations_is_another_than_that_of_the_test():
    text = accuracy.docstrings()
    assert len(text) > 200_000
    lines = {line for line in text.splitlines() if len(line) > 40}
    shared = lines & set(accuracy.common.english_text().splitlines())
    assert len(shared) < len(lines) / 50
