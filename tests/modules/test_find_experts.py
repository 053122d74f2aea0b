"""``quantize_`` and ``dequantize_`` on models with experts: sites, what is left out, sharing, and the same numbers."""

import copy
import weakref

import pytest
import torch
import transformers
from compiling import compile_eager
from model_zoo import ZOO, output
from torch import nn

import int8compile
from int8compile import Int8Experts, Int8Linear, Reason, dequantize_, quantize_

ALL = {"min_features": 0}
ENTRIES = {entry.name: entry for entry in ZOO}
#: the first two stand for both orders in which weights are stored
MIXTURES = [
    "Mixtral",
    "gpt-oss",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("Qwen3-MoE", "OLMoE", "DeepSeek-V3")),
]


def zoo(name="Mixtral"):
    model, inputs = ENTRIES[name].make()
    return model.requires_grad_(False), inputs


def run(model, inputs):
    with torch.no_grad():
        return output(model(**inputs))


def experts_of(report):
    return {site.path: (site.size, site.reason) for site in report.sites if site.experts}


@pytest.mark.parametrize("name", MIXTURES)
def test_modules_have_the_bits_of_the_pass(name):
    model, inputs = zoo(name)
    torch.compiler.reset()
    want = run(compile_eager(model), inputs)
    backend = experts_of(int8compile.last_report())
    torch.compiler.reset()
    report = quantize_(model, ALL)
    assert report.rewritten == ENTRIES[name].int8
    assert experts_of(report) == backend
    eager, compiled = run(model, inputs), run(compile_eager(model), inputs)
    torch.testing.assert_close(eager, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(compiled, want)
    # Routers too are as they are in the float model.
    reasons = {(s.path, s.reason) for s in int8compile.last_report().sites if not s.rewritten}
    assert {reason for _, reason in reasons} == {Reason.ROUTER, Reason.OUTPUT_EMBEDDING}


@pytest.mark.parametrize("name", MIXTURES)
def test_fullgraph_with_prompts_and_tokens(name):
    model, inputs = zoo(name)
    quantize_(model, ALL)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="int8", fullgraph=True)
    for ids in (inputs["input_ids"], inputs["input_ids"][:, :1]):
        want, got = (run(m, {"input_ids": ids, "use_cache": False}) for m in (model, compiled))
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_sites_and_bytes():
    model, _ = zoo()
    before = {name: p.numel() for name, p in model.named_parameters() if "experts" in name}
    report = quantize_(model, ALL)
    assert experts_of(report) == {
        f"model.layers.{layer}.mlp.experts.{name}": (size, Reason.REWRITTEN)
        for layer in (0, 1)
        for name, size in (("gate_up_proj", "4 x 32 x 128"), ("down_proj", "4 x 64 x 32"))
    }
    scales = 2 * 4 * (4 * 128 + 4 * 32)
    whole = sum(use.int8_bytes for g in report.graphs for use in g.weights)
    linears = sum(m.weight.numel() + 4 * m.out_features for m in model.modules() if isinstance(m, Int8Linear))
    assert whole - linears == sum(before.values()) + scales


def test_weights_that_are_stored_transposed():
    model, _ = zoo("gpt-oss")
    assert {size for size, _ in experts_of(quantize_(model, ALL)).values()} == {"4 x 32 x 128", "4 x 64 x 32"}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"llm_int8_skip_modules": ["experts"]}, {"gate_up_proj": Reason.SKIPPED, "down_proj": Reason.SKIPPED}),
        ({"llm_int8_skip_modules": ["experts.down_proj"]}, {"down_proj": Reason.SKIPPED}),
        (
            {"llm_int8_skip_modules": ["model.layers.*.mlp"]},
            {"gate_up_proj": Reason.SKIPPED, "down_proj": Reason.SKIPPED},
        ),
        ({"min_features": 64}, {"gate_up_proj": Reason.TOO_SMALL, "down_proj": Reason.TOO_SMALL}),
        ({"llm_int8_has_fp16_weight": True}, {"gate_up_proj": Reason.EXPERTS, "down_proj": Reason.EXPERTS}),
    ],
)
def test_what_stays_float_has_its_reason_and_is_what_the_backend_leaves(options, left):
    model, inputs = zoo()
    torch.compiler.reset()
    want = run(compile_eager(model, **options), inputs)
    report = quantize_(model, {**ALL, **options})
    found = {site.path.rpartition(".")[2]: site.reason for site in report.sites if site.experts and not site.rewritten}
    assert found == left
    assert not report.unmatched
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, Int8Experts) == (len(left) < 2)
    torch.compiler.reset()
    torch.testing.assert_close(run(compile_eager(model, **options), inputs), want)


def test_weights_only_by_name():
    model, inputs = zoo()
    report = quantize_(model, {**ALL, "llm_int8_weight_only_modules": ["experts.down_proj", "layers.1.mlp.experts"]})
    experts = [layer.mlp.experts for layer in model.model.layers]
    assert [{name: how[1] for name, how in e.int8.items()} for e in experts] == [
        {"gate_up_proj": "column", "down_proj": "all"},
        {"gate_up_proj": "all", "down_proj": "all"},
    ]
    assert sum(site.detail == "weights only" for site in report.sites) == 3
    assert run(model, inputs).isfinite().all()


def test_there_and_back():
    model, inputs = zoo("gpt-oss")
    types = [type(m) for m in model.modules()]
    keys = set(model.state_dict())
    quantize_(model, ALL)
    want = run(model, inputs)
    assert dequantize_(model) == 8 + 2
    assert [type(m) for m in model.modules()] == types
    assert set(model.state_dict()) == keys
    near = run(model, inputs)
    assert (near - want).norm() < 0.05 * want.norm()
    quantize_(model, ALL)
    torch.testing.assert_close(run(model, inputs), want, rtol=1e-3, atol=1e-3)


def test_a_second_time_changes_nothing_and_takes_what_was_left():
    model, inputs = zoo()
    quantize_(model, {**ALL, "llm_int8_skip_modules": ["down_proj"]})
    half = model.model.layers[0].mlp.experts
    report = quantize_(model, ALL)
    assert model.model.layers[0].mlp.experts is half
    assert sum(s.reason is Reason.PREQUANTIZED for s in report.sites if s.experts) == 2
    assert sum(s.reason is Reason.REWRITTEN for s in report.sites if s.experts) == 2
    whole, _ = zoo()
    quantize_(whole, ALL)
    assert torch.equal(run(model, inputs), run(whole, inputs))
    before = half.int8_weight("down_proj")
    assert quantize_(model, ALL).rewritten == 12
    assert half.down_proj is before.weight


def test_experts_that_layers_share():
    model, _ = zoo()
    first, second = (layer.mlp for layer in model.model.layers)
    second.experts = first.experts
    report = quantize_(model, ALL)
    assert second.experts is first.experts
    assert len(experts_of(report)) == 2
    dequantize_(model)
    assert second.experts is first.experts


def test_weights_that_experts_share():
    model, inputs = zoo()
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    want = run(copy.deepcopy(model), inputs)
    quantize_(model, ALL)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert second.down_proj is first.down_proj
    assert second.gate_up_proj is not first.gate_up_proj
    assert (run(model, inputs) - want).norm() < 0.05 * want.norm()
    dequantize_(model)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert second.down_proj is first.down_proj


def test_float_weights_are_let_go():
    model, _ = zoo()
    weights = [weakref.ref(p) for name, p in model.named_parameters() if "experts" in name]
    quantize_(model, ALL)
    assert not [w for w in weights if w() is not None]


def test_on_the_meta_device_and_filled():
    model, _ = zoo("gpt-oss")
    quantize_(model, ALL)
    skeleton = copy.deepcopy(model).to("meta")
    with torch.device("meta"):
        other = type(model)(model.config)
    quantize_(other, ALL)
    for empty in (skeleton, other):
        missing = empty.load_state_dict(model.state_dict(), assign=True)
        assert not missing.missing_keys
        assert not missing.unexpected_keys


def test_training_mode_is_kept():
    model, _ = zoo()
    model.train()
    quantize_(model, ALL)
    assert model.model.layers[0].mlp.experts.training
    dequantize_(model)
    assert model.model.layers[0].mlp.experts.training


def test_routers_that_are_linears_stay_float():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "num_dense_layers": 0, "max_position_embeddings": 64}
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = transformers.AfmoeForCausalLM(transformers.AfmoeConfig(**sizes, **experts)).eval()
    report = quantize_(model, ALL)
    left = {site.path.split(".", 3)[-1]: site.reason for site in report.sites if not site.rewritten}
    assert left == {"mlp.router.gate": Reason.ROUTER, "lm_head": Reason.OUTPUT_EMBEDDING}
    assert sum(site.rewritten for site in report.sites if site.experts) == 4
    assert run(model, {"input_ids": torch.arange(6)[None]}).isfinite().all()


class Bare(nn.Module):
    """Experts of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8))


class OwnConvolution(nn.Conv1d):
    pass


def test_other_modules_stay_float_and_are_said_to_be_there():
    model = nn.ModuleDict({"bare": Bare(), "fc": nn.Linear(8, 8), "conv": nn.Conv1d(8, 8, 3)})
    model["own"], model["normed"] = OwnConvolution(8, 8, 3), nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3))
    report = quantize_(model, ALL)
    assert {site.path: site.reason for site in report.sites} == {"bare.weight": Reason.EXPERTS, "fc": Reason.REWRITTEN}
    assert type(model["bare"]) is Bare
