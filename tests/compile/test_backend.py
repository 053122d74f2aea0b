"""``torch.compile(model, backend="int8")`` as users write it, through inductor."""

import logging
import operator
import subprocess
import sys

import pytest
import torch
from compiling import compile_eager, int8_linear
from torch import nn
from torch.nn import functional as F

import int8compile
from int8compile.report import Reason

SMALL = {"min_features": 0}


class Mlp(nn.Module):
    """gate/up/down, so that sharing and merging take part."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 24), nn.Linear(width, 24), nn.Linear(24, width)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))

    def emulate(self, x):
        def linear(fc, x):
            return int8_linear(x, fc.weight, fc.bias)

        return x + linear(self.down, F.silu(linear(self.gate, x)) * linear(self.up, x))


def activation(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 3] = 9.0
    return x


def test_is_registered_without_an_import_of_ours():
    script = (
        "import torch, sys; assert 'int8' in torch._dynamo.list_backends(); "
        "assert not any(m.startswith('int8compile') for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


def test_import_is_light():
    script = (
        "import sys, int8compile; int8compile.Int8Config; "
        "assert not {'transformers', 'peft', 'accelerate', 'typer'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd="/")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kwargs", [{}, {"fullgraph": True}, {"dynamic": True}])
def test_compiles_through_inductor(dtype, kwargs):
    model, x = Mlp().to(dtype), activation(5, 16).to(dtype)
    with torch.no_grad():
        out = torch.compile(model, backend="int8", options=SMALL, **kwargs)(x)
        assert out.dtype == dtype
        bound = 1e-5 if dtype is torch.float32 else 3e-2
        assert (out - model.emulate(x)).norm() < bound * model.emulate(x).norm()
    assert int8compile.last_report().summary() == "3 of 3 linears"


def test_mode_and_inductor_options_reach_inductor(monkeypatch):
    seen = {}

    def compile_fx(gm, inputs, config_patches, decompositions):
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("int8compile.torch_internals.inductor.compile_fx", compile_fx)
    x = activation(5, 16)
    with torch.no_grad():
        torch.compile(Mlp(), backend="int8", mode="max-autotune-no-cudagraphs")(x)
        assert seen["max_autotune"] is True
        seen.clear()
        torch._dynamo.reset()
        options = {"mode": "max-autotune-no-cudagraphs", "inductor": {"epilogue_fusion": False}}
        torch.compile(Mlp(), backend="int8", options=options)(x)
        assert seen["max_autotune"] is True
        assert seen["epilogue_fusion"] is False


def test_a_bitsandbytes_config_as_options():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["up"])
    model, x = Mlp(128), activation(5, 128)
    model.gate, model.up, model.down = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 128)
    with torch.no_grad():
        torch.compile(model, backend="int8", options=theirs)(x)
    assert [s.reason for s in int8compile.last_report().sites] == [Reason.REWRITTEN, Reason.SKIPPED, Reason.REWRITTEN]


@pytest.mark.parametrize("dynamic", [False, True])
def test_reference_bodies_compile_in_place_of_the_operators(dynamic):
    """Inductor gets the bodies, forward and backward, and no call of ours is left."""
    targets = []

    def look(graph):
        targets.extend(str(n.target) for n in graph.nodes)

    model, x = Mlp(), activation(5, 16).requires_grad_()
    for fc in (model.gate, model.up, model.down):
        fc.weight.requires_grad_(False)
    options = {
        **SMALL,
        "kernels": "reference",
        "inductor": {"post_grad_custom_post_pass": look, "fx_graph_cache": False},
    }
    out = torch.compile(model, backend="int8", options=options, dynamic=dynamic)(x)
    torch.testing.assert_close(out, model.emulate(x), rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(model.emulate(x).sum(), x)
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-4)
    assert "aten.mm.default" in targets
    assert not any("int8compile" in target for target in targets)


def test_gradients_reach_the_input_and_the_float_parameters():
    model, x = Mlp(), activation(5, 16).requires_grad_()
    for fc in (model.gate, model.up, model.down):
        fc.weight.requires_grad_(False)
    torch.compile(model, backend="int8", options=SMALL)(x).sum().backward()
    got = [x.grad, model.gate.bias.grad, model.down.bias.grad]
    x.grad = None
    for fc in (model.gate, model.up, model.down):
        fc.bias.grad = None
    model.emulate(x).sum().backward()
    for actual, want in zip(got, [x.grad, model.gate.bias.grad, model.down.bias.grad], strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-4, atol=1e-5)


def test_trainable_weights_stay_in_float_with_one_warning(caplog):
    model, x = Mlp(), activation(5, 16)
    with caplog.at_level(logging.WARNING, logger="int8compile"):
        out = compile_eager(model)(x)
    torch.testing.assert_close(out, model(x))
    assert {site.reason for site in int8compile.last_report().sites} == {Reason.TRAINABLE}
    (record,) = caplog.records
    assert "torch.no_grad()" in record.message
    assert "requires_grad_(False)" in record.message


def test_trainable_inside_no_grad_of_the_model_itself():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.body(x)
            return self.head(x)

    out = compile_eager(Frozen())(activation(5, 16))
    assert [s.reason for s in int8compile.last_report().sites] == [Reason.REWRITTEN, Reason.TRAINABLE]
    assert out.requires_grad


def test_log_says_what_was_done(caplog):
    model = nn.ModuleDict({"fc": nn.Linear(16, 16), "lm_head": nn.Linear(16, 16)})
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="int8compile"):
        compile_eager(lambda x: model["lm_head"](model["fc"](x)))(activation(5, 16))
    assert [r.message for r in caplog.records] == ["int8: 1 of 2 linears, 1 left in float (OUTPUT_EMBEDDING lm_head)"]


def test_log_warns_when_nothing_was_rewritten(caplog):
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="int8compile"):
        compile_eager(Mlp(), min_features=64)(activation(5, 16))
        compile_eager(nn.ReLU())(activation(5, 16))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0 of 3 linears, 3 left in float (3 TOO_SMALL). Most often TOO_SMALL: fewer features" in record.message


def test_the_provider_is_reported():
    for kernels, name in (("auto", "native "), ("native", "native "), ("reference", "reference (cpu)")):
        with torch.no_grad():
            compile_eager(Mlp(), kernels=kernels)(activation(5, 16))
        (provider,) = int8compile.last_report().providers
        assert provider.startswith(name)


def test_the_model_is_not_changed():
    model = Mlp()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        compile_eager(model)(activation(5, 16))
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.gate) is nn.Linear


def test_weight_changed_inside_the_model_is_left_alone():
    class Drifting(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16, bias=False).requires_grad_(False)

        def forward(self, x):
            self.fc.weight.mul_(0.5)
            return self.fc(x)

    model, x = Drifting(), activation(5, 16)
    want = F.linear(x, model.fc.weight * 0.5)
    torch.testing.assert_close(compile_eager(model)(x), want)
    assert [s.reason for s in int8compile.last_report().sites] == [Reason.MUTATED]


def test_activation_changed_between_two_readers():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            x = x * 1
            first = self.a(x)
            view = x.view(-1)
            view += 1
            return first, self.b(x)

    model, x = InPlace(), activation(5, 16)
    with torch.no_grad():
        first, second = torch.compile(model, backend="int8", options=SMALL)(x)
        torch.testing.assert_close(first, int8_linear(x, model.a.weight, model.a.bias))
        torch.testing.assert_close(second, int8_linear(x + 1, model.b.weight, model.b.bias))


def test_merged_outputs_can_be_reshaped_and_written_to():
    class Awkward(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 6), nn.Linear(16, 10)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            a.mul_(2)
            return a.view(-1), b.view(x.shape[0], -1), b

    model, x = Awkward(), activation(2, 3, 16)
    with torch.no_grad():
        a, b, c = torch.compile(model, backend="int8", options=SMALL)(x)
        torch.testing.assert_close(a, 2 * int8_linear(x, model.a.weight, model.a.bias).view(-1))
        torch.testing.assert_close(b.view(2, 3, 10), int8_linear(x, model.b.weight, model.b.bias))
        assert c.is_contiguous()
    assert int8compile.last_report().graphs[0].pass_counts["merge"] == 2


def test_linear_inside_activation_checkpointing_is_reported_and_right():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 16).requires_grad_(False)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.fc, x, use_reentrant=False)

    model, x = Checkpointed(), activation(5, 16).requires_grad_()
    out = compile_eager(model)(x)
    torch.testing.assert_close(out, model(x))
    assert [s.reason for s in int8compile.last_report().sites] == [Reason.NESTED]


@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: torch.vmap(model)(x),
        lambda model, x: torch.vmap(model, in_dims=1)(x),
        lambda model, x: torch.func.grad(lambda x: model(x).square().sum())(x),
        lambda model, x: torch.func.jacrev(model)(x[0]),
        lambda model, x: torch.func.jvp(model, (x,), (x,))[1],
    ],
    ids=["vmap", "vmap over columns", "grad", "jacrev", "jvp"],
)
def test_linears_inside_transforms_of_torch_func_are_reported_and_right(function):
    class Transformed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = Mlp().requires_grad_(False), nn.Linear(16, 16).requires_grad_(False)

        def forward(self, x):
            return function(self.inner, x), self.outer(x)

    model, x = Transformed(), activation(16, 16)
    inner, outer = compile_eager(model)(x)
    torch.testing.assert_close(inner, model(x)[0])
    assert torch.equal(outer, int8_linear(x, model.outer.weight, model.outer.bias))
    sites = {site.path: site.reason for site in int8compile.last_report().sites}
    assert sites.pop("outer") is Reason.REWRITTEN
    assert len(sites) == 3
    assert set(sites.values()) == {Reason.NESTED}


def test_activations_that_are_nested_tensors_stay_in_float():
    model = Mlp()
    x = torch.nested.nested_tensor([activation(3, 16), activation(5, 16)], layout=torch.jagged)
    with torch.no_grad():
        torch.testing.assert_close(compile_eager(model)(x).values(), model(x).values())
    sites = int8compile.last_report().sites
    assert {(s.reason, s.detail) for s in sites} == {(Reason.SUBCLASS, "activation: NestedTensor")}


def test_inductors_freezing_is_named():
    model, x = Mlp(), activation(5, 16)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        torch.testing.assert_close(compile_eager(model)(x), model(x))
    assert {site.reason for site in int8compile.last_report().sites} == {Reason.FROZEN}


def test_operator_counts_of_a_rewritten_graph():
    compiled = compile_eager(Mlp())
    with torch.no_grad():
        compiled(activation(5, 16))
    (gm,) = compiled.graphs
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert calls.count(torch.ops.int8compile.linear.default) == 2
    assert torch._C._nn.linear not in calls
    assert operator.add in calls
