"""Round trips with bitsandbytes itself: every family, dtype, tied and not; both ways, and there and back."""

import copy
import logging

import pytest
import torch
import transformers
from model_zoo import ZOO, output, tokens
from torch import nn

pytest.importorskip("bitsandbytes")
from bitsandbytes.nn import Linear8bitLt
from transformers import BitsAndBytesConfig

from int8compile import Int8Linear, quantize_
from int8compile.integrations.transformers import save_pretrained, take_over_bitsandbytes

ENTRIES = {entry.name: entry for entry in ZOO}
_SIZES = {"vocab_size": 96, "pad_token_id": 0, "decoder_start_token_id": 0}
_LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
_T5 = {**_SIZES, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
_PAIR = {"input_ids": tokens(), "decoder_input_ids": tokens(4, seed=1)}

# Families that the zoo lacks: model class, its configuration, and inputs.
MORE = {
    "DistilBERT": (
        transformers.DistilBertForSequenceClassification,
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
        {"input_ids": tokens()},
    ),
    "MT5": (transformers.MT5ForConditionalGeneration, _T5, _PAIR),
    "UMT5": (transformers.UMT5ForConditionalGeneration, _T5, _PAIR),
    "BART": (
        transformers.BartForConditionalGeneration,
        {**_SIZES, **_LAYERS, "d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        _PAIR,
    ),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = (
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3", "Phi3", "GPT-2", "GPT-NeoX", "BLOOM", "OPT", "Mixtral", "BERT"),
    *("RoBERTa", "ViT", "CLIP", "Whisper", "T5", "DistilBERT", "MT5", "UMT5", "BART", "Falcon"),
)
#: of the linears that become int8 here, those that bitsandbytes has in float, by the end of their paths
FLOAT_THERE = {"T5": ".wo", "MT5": ".wo", "UMT5": ".wo"}


def _cases():
    """The whole product; each family once among the fast tests, with dtypes in turn."""
    for i, name in enumerate(NAMES):
        for tied in (True, False):
            for dtype in DTYPES:
                fast = dtype == DTYPES[i % 3] and tied == (i % 2 == 0)
                label = f"{name}-{str(dtype).removeprefix('torch.')}-{'tied' if tied else 'untied'}"
                yield pytest.param((name, dtype, tied), id=label, marks=() if fast else pytest.mark.slow)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("bitsandbytes"), "level", logging.ERROR)  # it tells of every cast


@pytest.fixture
def float_model(request, tmp_path, caplog):
    """A float checkpoint of a family: its class, dtype, folder and inputs."""
    name, dtype, tied = request.param
    caplog.set_level(logging.WARNING, logger="transformers")
    if name in MORE:
        family, sizes, inputs = MORE[name]
        config = family.config_class(**sizes)
    else:
        model, inputs = ENTRIES[name].make()
        family, config = type(model), copy.deepcopy(model.config)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    family(config).to(dtype).save_pretrained(tmp_path / "float")
    caplog.clear()
    return name, family, dtype, {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def load_theirs(family, folder, **options):
    model, info = family.from_pretrained(folder, device_map="cpu", output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def load_ours(family, folder, **options):
    take_over_bitsandbytes()
    try:
        model, info = family.from_pretrained(folder, output_loading_info=True, **options)
    finally:
        take_over_bitsandbytes(False)
    assert not any(info.values()), info
    return model


def result(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return output(model(**inputs)).float()


def int8_of(model: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and absmax of a model's int8 linears, whoever made it."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear8bitLt):
            absmax = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            found[path] = module.weight.data, absmax
        elif isinstance(module, Int8Linear):
            found[path] = module.weight, module.weight_scale * 127
    assert all((codes.dtype, absmax.dtype) == (torch.int8, torch.float32) for codes, absmax in found.values())
    return found


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Two right computations of one int8 model: bitsandbytes casts activations to fp16 before it quantises them."""
    return bool((got - want).norm() < 0.04 * want.norm())


@pytest.mark.parametrize("float_model", [*_cases()], indirect=True)
def test_theirs_to_ours_and_back(float_model, tmp_path, caplog):
    name, family, dtype, inputs = float_model
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = family.from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu", dtype=dtype)
    want, theirs_int8 = result(theirs, inputs), int8_of(theirs)
    assert bool(theirs_int8) == (name != "Falcon")  # whose linears are a subclass
    theirs.save_pretrained(tmp_path / "theirs")

    ours = load_ours(family, tmp_path / "theirs")
    ours_int8 = int8_of(ours)
    assert ours_int8.keys() == theirs_int8.keys()
    for path, (codes, absmax) in theirs_int8.items():
        assert torch.equal(ours_int8[path][0], codes)
        assert torch.equal(ours.get_submodule(path).weight_scale, absmax / 127)
    assert close(result(ours, inputs), want)

    save_pretrained(ours, tmp_path / "back", format="bitsandbytes")
    back = load_theirs(family, tmp_path / "back")
    back_int8 = int8_of(back)
    assert back_int8.keys() == theirs_int8.keys()
    for path, pair in theirs_int8.items():
        assert all(map(torch.equal, back_int8[path], pair))
    assert (result(back, inputs) - want).norm() <= 1e-6 * want.norm()  # attention alone may sum in another order
    assert "newly initialized" not in caplog.text
    assert "as float" not in caplog.text


@pytest.mark.parametrize("float_model", [*_cases()], indirect=True)
def test_ours_to_theirs(float_model, tmp_path, caplog):
    name, family, dtype, inputs = float_model
    ours = family.from_pretrained(tmp_path / "float", dtype=dtype).requires_grad_(False)
    quantize_(ours, {"min_features": 0})
    if name == "Falcon":
        with pytest.raises(ValueError, match=r"h\.\*\.mlp\.dense_h_to_4h.* are float, all there are"):
            save_pretrained(ours, tmp_path / "ours", format="bitsandbytes")
        assert not (tmp_path / "ours").exists()
        return
    save_pretrained(ours, tmp_path / "ours", format="bitsandbytes")
    theirs = load_theirs(family, tmp_path / "ours")
    mine, found = int8_of(ours), int8_of(theirs)
    float_there = {path for path in mine if path.endswith(FLOAT_THERE.get(name, "/"))}
    assert ("written in float" in caplog.text) == bool(float_there)
    # transformers keeps T5's wo in float32 at fp16, and so in float here too
    assert bool(float_there) == (name in FLOAT_THERE and dtype != torch.float16)
    assert found.keys() == mine.keys() - float_there
    for path, (codes, absmax) in found.items():
        assert torch.equal(codes, mine[path][0])
        assert torch.equal(absmax / 127, ours.get_submodule(path).weight_scale)
    for path in float_there:
        assert torch.equal(theirs.get_submodule(path).weight, ours.get_submodule(path).dequantize())
    assert close(result(theirs, inputs), result(ours, inputs))
    again = load_ours(family, tmp_path / "ours")
    assert int8_of(again).keys() == found.keys()


@pytest.mark.parametrize("float_model", [("DistilBERT", torch.float16, False)], indirect=True)
@pytest.mark.parametrize("skip", [["classifier"], ["pre_classifier"], ["layer.1", "classifier"], ["lin1"], ["*.0.*"]])
def test_a_skipped_module_skips_no_other(float_model, tmp_path, skip):
    """To transformers ``classifier`` names ``pre_classifier`` too."""
    _, family, dtype, inputs = float_model
    ours = family.from_pretrained(tmp_path / "float", dtype=dtype).requires_grad_(False)
    quantize_(ours, {"min_features": 0, "llm_int8_skip_modules": skip})
    save_pretrained(ours, tmp_path / "ours", format="bitsandbytes")
    theirs = load_theirs(family, tmp_path / "ours")
    assert 0 < len(int8_of(ours)) < 14
    assert int8_of(theirs).keys() == int8_of(ours).keys() == int8_of(load_ours(family, tmp_path / "ours")).keys()
    assert close(result(theirs, inputs), result(ours, inputs))


@pytest.mark.parametrize(
    "float_model", [("Llama", torch.bfloat16, False), ("GPT-2", torch.float16, True)], indirect=True
)
def test_every_way_of_loading(float_model, tmp_path):
    _, family, dtype, inputs = float_model
    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = family.from_pretrained(tmp_path / "float", quantization_config=config, device_map="cpu", dtype=dtype)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    first = None
    ways = [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": "auto"}]
    for way in ways:
        ours = load_ours(family, tmp_path / "theirs", **way)
        assert ours.dtype == dtype
        first = result(ours, inputs) if first is None else first
        assert torch.equal(result(ours, inputs), first)
    assert close(first, result(theirs, inputs))
    for other in DTYPES:
        ours = load_ours(family, tmp_path / "theirs", dtype=other)
        assert {p.dtype for p in ours.parameters()} == {other}
        scales = {path: module.weight_scale for path, module in ours.named_modules() if isinstance(module, Int8Linear)}
        assert all(torch.equal(scales[path], absmax / 127) for path, (_, absmax) in int8_of(theirs).items())
    save_pretrained(ours, tmp_path / "back", format="bitsandbytes", max_shard_size="10KB")
    assert int8_of(load_theirs(family, tmp_path / "back")).keys() == scales.keys()


@pytest.mark.parametrize(
    "float_model", [("Llama", torch.float32, False), ("Llama", torch.float32, True)], indirect=True
)
def test_an_int8_output_embedding(float_model, tmp_path):
    """Nothing is left in float then, and an empty list must not bring bitsandbytes' defaults back."""
    _, family, dtype, inputs = float_model
    ours = family.from_pretrained(tmp_path / "float", dtype=dtype).requires_grad_(False)
    quantize_(ours, {"min_features": 0, "skip_output_embeddings": False})
    assert isinstance(ours.lm_head, Int8Linear)
    save_pretrained(ours, tmp_path / "ours", format="bitsandbytes")
    theirs = load_theirs(family, tmp_path / "ours")
    assert theirs.config.quantization_config.llm_int8_skip_modules == []
    assert int8_of(theirs).keys() == int8_of(ours).keys()
    assert close(result(theirs, inputs), result(ours, inputs))
