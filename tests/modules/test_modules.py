"""``Int8Linear`` as a module: numerics, casts and moves, copies, state dicts, and every way of running it."""

import copy
import io
import pickle

import pytest
import torch
from compiling import compile_eager
from torch import nn

import int8compile
import int8compile.ops
from int8compile import Int8Linear, Reason


def float_linear(k: int = 48, n: int = 32, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 3] = 9.0
    return x.to(dtype)


def expected(linear: nn.Linear, x: torch.Tensor, threshold: float = 6.0, policy: str = "column") -> torch.Tensor:
    codes, scale = int8compile.ops.quantize_weight(linear.weight)
    return int8compile.ops.linear(x, codes, scale, linear.bias, threshold, policy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_operator_does(dtype, bias):
    linear, x = float_linear(bias=bias, dtype=dtype), activation(2, 5, 48, dtype=dtype)
    module = Int8Linear.from_float(linear)
    assert module(x).dtype == dtype
    assert torch.equal(module(x), expected(linear, x))
    config = int8compile.Int8Config(llm_int8_threshold=2, outlier_policy="element")
    assert torch.equal(Int8Linear.from_float(linear, config)(x), expected(linear, x, 2.0, "element"))


def test_weights_only():
    linear, x = float_linear(dtype=torch.bfloat16), activation(2, 5, 48, dtype=torch.bfloat16)
    everywhere = Int8Linear.from_float(linear, int8compile.Int8Config(activation="float"))
    named = int8compile.Int8Config(llm_int8_weight_only_modules=("fc",))
    here, elsewhere = (Int8Linear.from_float(linear, named, paths=[path]) for path in ("block.fc", "block.other"))
    assert [m.outlier_policy for m in (everywhere, here, elsewhere)] == ["all", "all", "column"]
    for module in (everywhere, here, copy.deepcopy(here), pickle.loads(pickle.dumps(here))):
        assert torch.equal(module(x), expected(linear, x, 0.0, "all"))
    assert "outlier_policy='all'" in repr(here)
    other = Int8Linear(48, 32, outlier_policy="all", dtype=torch.bfloat16)
    other.load_state_dict(here.state_dict())
    assert torch.equal(other(x), here(x))
    x = x.float().requires_grad_()
    here(x).sum().backward()
    torch.testing.assert_close(x.grad, here.dequantize(torch.float32).sum(0).expand_as(x), rtol=1e-2, atol=1e-2)


def test_a_new_one_is_zero_and_has_the_names_of_a_linear():
    module = Int8Linear(48, 32)
    assert torch.equal(module(activation(5, 48)), torch.zeros(5, 32))
    assert {n: (b.dtype, tuple(b.shape)) for n, b in module.named_buffers()} == {
        "weight": (torch.int8, (32, 48)),
        "weight_scale": (torch.float32, (32,)),
    }
    assert [(n, tuple(p.shape)) for n, p in module.named_parameters()] == [("bias", (32,))]
    assert "in_features=48, out_features=32, bias=True, threshold=6" in repr(module)
    with pytest.raises(int8compile.config.OptionValueError, match="outlier_policy='rows'"):
        Int8Linear(48, 32, outlier_policy="rows")


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.type(torch.float16),
    ],
)
def test_a_cast_moves_the_bias_alone(cast):
    module = Int8Linear.from_float(float_linear())
    codes, scale = module.weight.clone(), module.weight_scale.clone()
    cast(module)
    assert module.bias.dtype == module.float_dtype == torch.float16
    assert module.weight.dtype == torch.int8
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight, codes)
    assert torch.equal(module.weight_scale, scale)
    assert module(activation(5, 48, dtype=torch.float16)).dtype == torch.float16


def test_moves_between_devices_and_out_of_meta():
    module = Int8Linear.from_float(float_linear())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to("meta", torch.bfloat16)
    assert {t.device.type for t in module.state_dict().values()} == {"meta"}
    assert module.weight_scale.dtype == torch.float32
    module.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(module.weight, state["weight"])


def test_shares_memory():
    module = Int8Linear.from_float(float_linear()).share_memory()
    assert all(t.is_shared() for t in module.state_dict().values())


def test_copies_and_pickles():
    module, x = Int8Linear.from_float(float_linear()), activation(5, 48)
    copied = copy.deepcopy(module)
    assert copied.weight.data_ptr() != module.weight.data_ptr()
    for other in (copied, pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))


def test_state_dict_is_plain_and_loads_without_unpickling_anything_else():
    module, other, x = Int8Linear.from_float(float_linear()), Int8Linear(48, 32), activation(5, 48)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))


def test_a_bitsandbytes_state_dict_loads_without_a_copy():
    linear = float_linear()
    absmax = linear.weight.abs().amax(dim=1)
    module = Int8Linear.from_float(linear)
    theirs = {
        "weight": module.weight.clone(),
        "SCB": absmax,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
        "bias": linear.bias,
    }
    other = Int8Linear(48, 32)
    other.load_state_dict(theirs, assign=True)
    assert other.weight.data_ptr() == theirs["weight"].data_ptr()
    assert torch.equal(other.weight_scale, module.weight_scale)
    assert set(theirs) == {"weight", "SCB", "weight_format", "bias"}


def test_state_dicts_that_are_not_int8_are_refused_by_name():
    module = Int8Linear.from_float(float_linear())
    model = nn.Sequential(Int8Linear(48, 32))
    good = {f"0.{name}": tensor for name, tensor in module.state_dict().items()}

    def refuses(pattern, **changes):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {k: v for k, v in {**good, **{f"0.{n}": t for n, t in changes.items()}}.items() if v is not None}
        with pytest.raises(RuntimeError, match=pattern):
            model.load_state_dict(state)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())

    refuses(r"0\.weight is torch.float32; expected int8", weight=torch.randn(32, 48))
    refuses(r"0\.weight_scale is missing beside the int8 0\.weight", weight_scale=None)
    refuses(r"0\.weight is missing", weight=None)
    refuses(r"0\.weight_scale is torch.float16 \[32\]", weight_scale=torch.ones(32, dtype=torch.float16))
    refuses(r"0\.SCB is torch.float32 \[31\]", weight_scale=None, SCB=torch.ones(31))
    refuses(r"0\.weight_format is 2, a layout of old bitsandbytes", SCB=torch.ones(32), weight_format=torch.tensor(2))
    refuses(r"0\.weight is int8 \[32, 40\]; expected \[32, 48\]", weight=torch.zeros(32, 40, dtype=torch.int8))
    model.load_state_dict(good)


def test_dequantises_and_goes_back_to_float():
    linear = float_linear()
    module = Int8Linear.from_float(linear)
    step = module.weight_scale.unsqueeze(1)
    assert ((module.dequantize() - linear.weight).abs() <= 0.5001 * step).all()
    back = module.to_float(torch.float64)
    assert type(back) is nn.Linear
    assert back.weight.dtype == back.bias.dtype == torch.float64
    again = Int8Linear.from_float(module.to_float())
    assert torch.equal(again.weight, module.weight)


def test_gradients_reach_the_input_and_the_bias():
    linear, x = float_linear(), activation(5, 48).requires_grad_()
    module = Int8Linear.from_float(linear)
    module.bias.requires_grad_()
    grad = torch.randn(5, 32)
    module(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ module.dequantize(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module.bias.grad, grad.sum(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(48, n, bias=n == 48) for n in (48, 16, 16))
        self.o = nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.relu(q) * torch.cat([k, v, k], dim=-1))


def int8_attention() -> nn.Module:
    model = Attention().requires_grad_(False)
    int8compile.quantize_(model, {"min_features": 0})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_one_call_under_plain_inductor(dtype):
    model, x = int8_attention().to(dtype), activation(5, 48, dtype=dtype)
    out = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(out, model(x), rtol=1e-2, atol=1e-2)


def test_kernels_are_loaded_while_dynamo_traces(monkeypatch):
    """A process that unpickled a model may compile it before it ever runs eagerly."""
    loaded = []
    monkeypatch.setattr("int8compile.modules.int8_linear._load_kernels", lambda *a: loaded.append(a) or True)
    torch.compile(Int8Linear.from_float(float_linear()), fullgraph=True, backend="eager")(activation(5, 48))
    assert loaded == [("auto", "cpu")]


def test_the_backend_sees_int8_linears_and_shares_their_activation():
    model, x = int8_attention(), activation(5, 48)
    compiled = compile_eager(model)
    assert torch.equal(compiled(x), model(x))
    targets = [str(n.target) for n in compiled.graphs[0].graph.nodes if "int8compile" in str(n.target)]
    assert targets == [
        "int8compile.quantize_rowwise.default",
        *["int8compile.scaled_mm.default"] * 3,
        "int8compile.linear.default",
    ]
    report = int8compile.last_report()
    assert [(s.path, s.in_features, s.out_features, s.reason) for s in report.sites] == [
        ("q", 48, 48, Reason.PREQUANTIZED),
        ("k", 48, 16, Reason.PREQUANTIZED),
        ("v", 48, 16, Reason.PREQUANTIZED),
        ("o", 48, 48, Reason.PREQUANTIZED),
    ]
    assert report.summary() == "4 of 4 linears"


def test_int8_calls_of_the_users_own_may_go_unread_and_leave_out_defaults():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = int8_attention()

        def forward(self, x):
            weight, scale = self.attention.q.weight, self.attention.q.weight_scale
            self.attention.v(x)
            torch.ops.int8compile.linear(x, weight, scale, None, 0.0)
            torch.ops.int8compile.quantize_rowwise.default(x, 6.0)
            codes, row_scale, _ = torch.ops.int8compile.quantize_rowwise.default(x, 0.0)
            own = torch.ops.int8compile.scaled_mm.default(
                codes, row_scale, x, None, weight, bias=None, weight_scale=scale, out_dtype=torch.float32
            )
            return own + self.attention.q(x) + self.attention.k(x).sum()

    model, x = Odd(), activation(5, 48)
    assert torch.equal(compile_eager(model)(x), model(x))


def test_int8_and_float_linears_side_by_side_under_the_backend():
    model, x = Attention().requires_grad_(False), activation(5, 48)
    int8compile.quantize_(model, {"min_features": 0, "llm_int8_skip_modules": ["k", "v"]})
    compiled = compile_eager(model)
    out = compiled(x)
    assert [s.reason for s in int8compile.last_report().sites] == [
        Reason.PREQUANTIZED,
        Reason.REWRITTEN,
        Reason.REWRITTEN,
        Reason.PREQUANTIZED,
    ]
    int8compile.quantize_(model, {"min_features": 0})
    assert torch.equal(out, model(x))


def test_a_changed_int8_weight_is_seen_by_compiled_code():
    model, x = int8_attention(), activation(5, 48)
    compiled = torch.compile(model, backend="int8")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(int8_attention().state_dict())
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    model.o = Int8Linear.from_float(float_linear(48, 48))
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_operator_called_with_keywords_is_a_site():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = Int8Linear.from_float(float_linear())

        def forward(self, x):
            op = torch.ops.int8compile.linear
            return op(x, self.fc.weight, self.fc.weight_scale, bias=None, threshold=6.0)

    model, x = Direct(), activation(5, 48)
    compiled = compile_eager(model)
    assert torch.equal(compiled(x), model(x))
    assert [s.reason for s in int8compile.last_report().sites] == [Reason.PREQUANTIZED]


def test_gradients_through_the_backend():
    model, x = int8_attention(), activation(5, 48).requires_grad_()
    (want,) = torch.autograd.grad(model(x).square().sum(), x)
    (got,) = torch.autograd.grad(torch.compile(model, backend="int8")(x).square().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
