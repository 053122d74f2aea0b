"""``Int8Experts``: numerics against a loop over experts, copies, casts, state dicts, and what is not taken."""

import copy
import io
import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from compiling import compile_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.integrations import moe

import int8compile
from int8compile import Int8Config, Int8Experts
from int8compile.modules.int8_experts import is_experts
from int8compile.ops import linear, quantize_weight

E, H, INNER = 5, 48, 32


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(H) + 0.5)

    def forward(self, x):
        return x * self.weight


def experts_class(transposed=False, bias=False, gate=True, norm=False):
    """A module of experts such as those of transformers' models, with each of its decorator's flags."""

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts, self.act_fn, self.limit = E, nn.SiLU(), 3.0
            first = "gate_up_proj" if gate else "up_proj"
            for name, n, k in ((first, 2 * INNER if gate else INNER, H), ("down_proj", H, INNER)):
                weight = torch.randn(E, k, n) if transposed else torch.randn(E, n, k)
                setattr(self, name, nn.Parameter(weight * k**-0.5))
                if bias:
                    setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, n)))
            if norm:
                self.post_expert_norm = Norm()

        if gate:

            def _apply_gate(self, gate_up):
                gate, up = gate_up[..., ::2], gate_up[..., 1::2]
                return self.act_fn(gate.clamp(max=self.limit)) * up

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("not asked for")

    flags = {"is_transposed": transposed, "has_bias": bias, "has_gate": gate, "has_post_expert_norm": norm}
    return moe.use_experts_implementation(Experts, **flags)


#: pickle finds classes by their names
Plain, GptOss = experts_class(), experts_class(transposed=True, bias=True)
NoGate, Normed = experts_class(gate=False), experts_class(norm=True)
for name in ("Plain", "GptOss", "NoGate", "Normed"):
    globals()[name].__qualname__ = name
KINDS = [Plain, GptOss, NoGate, Normed]


def made(kind, dtype=torch.float32, implementation="grouped_mm"):
    module = kind(SimpleNamespace(_experts_implementation=implementation))
    return module.to(dtype).requires_grad_(False)


def inputs(tokens=7, active=2, dtype=torch.float32):
    x = torch.randn(tokens, H)
    x[:, 3] *= 9
    chosen = (
        torch.stack([torch.randperm(E)[:active] for _ in range(tokens)]) if tokens else torch.zeros(0, active).long()
    )
    return x.to(dtype), chosen, torch.rand(tokens, active)


def looped(module, x, chosen, weights, threshold=6.0, policy="column"):
    """Each expert by itself, in int8 linears of our own."""
    out = torch.zeros(*chosen.shape, H, dtype=x.dtype)
    first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"

    def product(name, rows, expert):
        weight, bias = getattr(module, name)[expert], getattr(module, f"{name}_bias", None)
        weight = weight.t() if module.is_transposed else weight
        return linear(rows, *quantize_weight(weight), None if bias is None else bias[expert], threshold, policy)

    for expert in range(E):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            inner = product(first, x[token], expert)
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            result = product(second, inner, expert)
            out[token, place] = module.post_expert_norm(result) if module.has_post_expert_norm else result
    return (out * weights.unsqueeze(-1)).sum(1).to(x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_computes_what_a_loop_over_int8_linears_does(kind, dtype):
    module = made(kind, dtype)
    for tokens, (threshold, policy) in itertools.product(
        (7, 1, 0), ((6.0, "column"), (2.0, "element"), (0.0, "column"))
    ):
        config = Int8Config(llm_int8_threshold=threshold, outlier_policy=policy)
        given = inputs(tokens, dtype=dtype)
        got = Int8Experts.from_float(module, config)(*given)
        assert got.dtype == dtype
        torch.testing.assert_close(got, looped(module, *given, threshold, policy))


@pytest.mark.parametrize("kind", KINDS)
def test_is_near_the_float_module_whichever_way_that_is_computed(kind):
    given = inputs()
    for implementation in ("grouped_mm", "batched_mm"):
        torch.manual_seed(0)
        module = made(kind, implementation=implementation)
        want, got = module(*given), Int8Experts.from_float(module)(*given)
        assert (got - want).norm() < 0.03 * want.norm()


@settings(max_examples=30, deadline=None)
@given(tokens=st.integers(1, 9), active=st.integers(1, E), seed=st.integers(0, 99))
def test_any_routing(tokens, active, seed):
    torch.manual_seed(seed)
    module = made(GptOss)
    given = inputs(tokens, active)
    torch.testing.assert_close(Int8Experts.from_float(module)(*given), looped(module, *given))


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_graph_and_has_the_bits_of_the_pass(kind):
    module, given = made(kind, torch.bfloat16), inputs(dtype=torch.bfloat16)
    mine = Int8Experts.from_float(module)
    torch.compiler.reset()
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), mine(*given))
    if not module.has_bias:  # which the float module adds by itself, and rounds once more
        assert torch.equal(compile_eager(module)(*given), compile_eager(mine)(*given))
    other = compile_eager(mine)
    other(*given)
    report = int8compile.last_report()
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    assert {(s.path, s.reason.name) for s in report.sites} == {(name, "PREQUANTIZED") for name in names}


def test_rows_of_no_expert_add_nothing():
    module = made(GptOss)
    x, chosen, weights = inputs(active=2)
    module._is_expert_parallel = True
    absent = chosen.clone()
    absent[::2, 1] = E
    only = weights.clone()
    only[::2, 1] = 0
    # (Under "column" an expert's outlier columns depend on the rows it is given.)
    config = Int8Config(outlier_policy="element")
    for names in (None, ["down_proj"], []):
        mine = Int8Experts.from_float(module, config, names=names)
        torch.testing.assert_close(mine(x, absent, weights), mine(x, chosen, only))
    assert mine(x, torch.full_like(chosen, E), weights).abs().max() == 0


def test_one_weight_may_stay_float():
    module, given = made(GptOss), inputs()
    whole = module(*given)
    for names in (["gate_up_proj"], ["down_proj"]):
        mine = Int8Experts.from_float(module, names=names)
        left = ({"gate_up_proj", "down_proj"} - set(names)).pop()
        assert getattr(mine, left) is getattr(module, left)
        assert 0 < (mine(*given) - whole).norm() < 0.03 * whole.norm()
        assert getattr(mine.to_float(), left) is getattr(module, left)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    module, given = made(kind), inputs()
    mine = Int8Experts.from_float(module)
    back = mine.to_float()
    assert type(back) is kind
    assert {k: v.shape for k, v in back.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    again = Int8Experts.from_float(back)
    for name in mine.int8:
        for a, b in zip(mine.int8_weight(name), again.int8_weight(name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    assert is_experts(back)
    assert back(*given).shape == mine(*given).shape
    assert mine.to_float(torch.bfloat16).down_proj.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in mine.to_float(torch.bfloat16).parameters(recurse=False))


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind, monkeypatch):
    mine, given = Int8Experts.from_float(made(kind)).eval(), inputs()
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(*given), mine(*given))
        assert not other.training
        assert other.down_proj.data_ptr() != mine.down_proj.data_ptr()


@pytest.mark.parametrize(
    "cast", [lambda m: m.half(), lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.float16)]
)
def test_casts_leave_codes_and_scales(cast):
    mine = Int8Experts.from_float(made(GptOss))
    before = {name: mine.int8_weight(name) for name in mine.int8}
    cast(mine)
    for name, (codes, scale) in before.items():
        assert torch.equal(getattr(mine, name), codes)
        assert torch.equal(getattr(mine, f"{name}_scale"), scale)
    assert mine.down_proj_bias.dtype == mine.float_dtype == torch.float16
    assert mine.to_float().down_proj.dtype == torch.float16
    x, *rest = inputs(dtype=torch.float16)
    assert mine(x, *rest).dtype == torch.float16


def test_moves_to_meta_and_back():
    mine = Int8Experts.from_float(made(GptOss))
    state = mine.state_dict()
    empty = copy.deepcopy(mine).to("meta")
    assert empty.down_proj.is_meta
    assert empty.down_proj_scale.is_meta
    empty.load_state_dict(state, assign=True)
    given = inputs()
    assert torch.equal(empty(*given), mine(*given))


def test_state_dict():
    mine, other = (Int8Experts.from_float(made(GptOss)) for _ in range(2))
    state, given = mine.state_dict(), inputs()
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in state.items()}
    assert shapes == {
        "gate_up_proj": (torch.int8, (E, 2 * INNER, H)),
        "gate_up_proj_scale": (torch.float32, (E, 2 * INNER)),
        "gate_up_proj_bias": (torch.float32, (E, 2 * INNER)),
        "down_proj": (torch.int8, (E, H, INNER)),
        "down_proj_scale": (torch.float32, (E, H)),
        "down_proj_bias": (torch.float32, (E, H)),
    }
    other.load_state_dict(state)
    assert torch.equal(other(*given), mine(*given))
    marked = {**state, "gate_up_proj": state["gate_up_proj"].unsqueeze(3)}
    other.load_state_dict(marked)
    assert torch.equal(other(*given), mine(*given))


@pytest.mark.parametrize(
    ("entry", "planted", "message"),
    [
        ("down_proj", lambda t: t.float(), "down_proj is torch.float32; expected int8"),
        ("down_proj", lambda t: t[:, :-1], r"down_proj is int8 \[5, 47, 32\]; expected \[5, 48, 32\]"),
        ("down_proj", lambda t: t.mT, r"down_proj is int8 \[5, 32, 48\]"),
        ("down_proj", lambda t: None, "down_proj is missing"),
        ("down_proj_scale", lambda t: None, "down_proj_scale is missing beside the int8 down_proj"),
        ("down_proj_scale", lambda t: t.half(), "down_proj_scale is torch.float16"),
        ("down_proj_scale", lambda t: t[:1], r"down_proj_scale is torch.float32 \[1, 48\]"),
        ("down_proj_scale", lambda t: t.unsqueeze(2), "down_proj_scale is torch.float32"),
    ],
)
def test_planted_entries_are_refused(entry, planted, message):
    mine, given = Int8Experts.from_float(made(Plain)), inputs()
    before, state = mine(*given), mine.state_dict()
    state[entry] = planted(state[entry])
    with pytest.raises(RuntimeError, match=message):
        mine.load_state_dict({name: t for name, t in state.items() if t is not None})
    assert torch.equal(mine(*given), before)


def test_a_state_dict_without_them_is_told_so():
    mine = Int8Experts.from_float(made(Plain))
    with pytest.raises(RuntimeError, match="Missing key"):
        mine.load_state_dict({})
    assert len(mine.load_state_dict({}, strict=False).missing_keys) == 4


def test_gradients_reach_activations_and_biases():
    module = made(GptOss)
    mine = Int8Experts.from_float(module).train()
    mine.down_proj_bias.requires_grad_()
    x, chosen, weights = inputs()
    x, weights = x.requires_grad_(), weights.requires_grad_()
    mine(x, chosen, weights).square().sum().backward()
    float_x, float_weights = x.detach().clone().requires_grad_(), weights.detach().clone().requires_grad_()
    reference = mine.to_float()
    reference.requires_grad_(False)
    reference.down_proj_bias.requires_grad_()
    mine.zero_grad()
    reference(float_x, chosen, float_weights).square().sum().backward()
    for got, want in ((x, float_x), (weights, float_weights)):
        assert (got.grad - want.grad).norm() < 0.05 * want.grad.norm()
    assert reference.down_proj_bias.grad is not None
    assert not mine.down_proj.requires_grad


def test_attributes_children_and_hooks_come_along():
    model = nn.Sequential(made(Normed))
    model[0].remark, calls = "kept", []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    int8compile.quantize_(model, {"min_features": 0})
    assert isinstance(model[0], Int8Experts)
    assert model[0].remark == "kept"
    assert "post_expert_norm.weight" in model[0].state_dict()
    model[0](*inputs())
    assert calls == [1]


class Other(Plain):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class WithConstant(Plain):
    scale = 2.0

    def _apply_gate(self, gate_up):
        return super()._apply_gate(gate_up) * self.scale


def own_gate(module):
    module._apply_gate = lambda gate_up: gate_up[..., :INNER]


def wrong_shape(module):
    module.down_proj = nn.Parameter(torch.randn(E + 1, H, INNER))


def own_forward(module):
    module.forward = lambda *args: args[0]


def parametrized(module):
    nn.utils.parametrize.register_parametrization(module, "down_proj", nn.Tanh())


def unknown_implementation(module):
    module.config._experts_implementation = "mine"


def two_dtypes(module):
    module.down_proj = nn.Parameter(module.down_proj.bfloat16())


def subclass(module):
    class Sub(nn.Parameter):
        pass

    module.down_proj = Sub(module.down_proj)


@pytest.mark.parametrize(
    "change",
    [
        wrong_shape,
        own_forward,
        own_gate,
        parametrized,
        unknown_implementation,
        two_dtypes,
        subclass,
        Other,
        WithConstant,
    ],
)
def test_what_is_not_known_stays_float(change):
    module = made(change if isinstance(change, type) else Plain)
    if not isinstance(change, type):
        change(module)
    model = nn.ModuleDict({"experts": module})
    report = int8compile.quantize_(model, {"min_features": 0})
    assert model["experts"] is module
    assert report.rewritten == 0
    assert {site.reason for site in report.sites if site.experts} == {int8compile.Reason.EXPERTS}
    with pytest.raises(TypeError, match="cannot be taken"):
        Int8Experts.from_float(module)


def test_a_model_that_is_itself_experts():
    with pytest.raises(int8compile.errors.ModuleError, match=r"Int8Experts\.from_float"):
        int8compile.quantize_(made(Plain))
    with pytest.raises(int8compile.errors.ModuleError, match=r"use model\.to_float"):
        int8compile.dequantize_(Int8Experts.from_float(made(Plain)))
