"""``llm_int8_has_fp16_weight=True``: weights that train in float under products in int8."""

import copy

import gold
import pytest
import torch
from compiling import compile_eager
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import int8compile
from int8compile import Int8Linear, Int8MasterLinear, Reason, dequantize_, quantize_
from int8compile.ops import master_linear
from int8compile.ops.master_linear import weight_gradient

TRAIN = {"min_features": 0, "llm_int8_has_fp16_weight": True}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def activation(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 3] *= 10
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("threshold", "policy"), [(6.0, "column"), (6.0, "element"), (0.0, "column")])
@pytest.mark.parametrize("shape", [(7, 48), (2, 3, 48), (48,), (0, 48)])
def test_agrees_with_the_gold(dtype, threshold, policy, shape):
    x, weight, bias = activation(*shape, dtype=dtype), torch.randn(20, 48).to(dtype), torch.randn(20).to(dtype)
    out = master_linear(x, weight, bias, threshold, policy)
    assert out.dtype == dtype
    assert out.shape == (*shape[:-1], 20)
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    if x.numel():
        want = gold.linear(x, *gold.weight_codes(weight), bias, threshold, policy, true_weight=weight)
        assert gold.relative_error(out, want) < bound


def test_outliers_meet_the_true_weight():
    """bitsandbytes multiplies them with the int8 weight, half a percent off."""
    x = torch.full((3, 16), 9.0)
    weight = torch.randn(8, 16)
    torch.testing.assert_close(master_linear(x, weight, None, 6.0), x @ weight.t(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_with_gradients(dtype):
    for threshold, policy, bias in ((6.0, "column", True), (0.0, "column", False), (6.0, "element", True)):
        x, weight = activation(3, 16, dtype=dtype), torch.randn(5, 16).to(dtype)
        leaves = [t.requires_grad_() for t in (x, weight, torch.randn(5).to(dtype))]
        torch.library.opcheck(master_linear, (*leaves[:2], leaves[2] if bias else None, threshold, policy))


def test_gradients_are_a_float_linears():
    """Straight through the rounding, each column of x once (a known error elsewhere counts outliers twice)."""
    x, weight, bias = activation(2, 7, 24), torch.randn(10, 24), torch.randn(10)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    same = [t.clone().requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(2, 7, 10)
    master_linear(*leaves, 6.0).backward(grad)
    F.linear(*same).backward(grad)
    for ours, theirs in zip(leaves, same, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_what_no_gradient_needs_is_not_saved():
    """As in a float linear: an activation of a frozen weight may be written to before the backward pass."""
    leaf, weight = activation(3, 24).requires_grad_(), torch.randn(10, 24)
    x = leaf * 1
    out = master_linear(x, weight, None, 6.0)
    x.mul_(3)
    out.sum().backward()
    torch.testing.assert_close(leaf.grad, weight.sum(0).expand(3, 24), rtol=1e-5, atol=1e-5)


def test_gradcheck_of_the_surrogate():
    class Surrogate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return F.linear(x, weight)

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad @ weight, weight_gradient(grad, x)

    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 6), (4, 6))]
    assert torch.autograd.gradcheck(Surrogate.apply, leaves)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 32), nn.Linear(32, 24, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


def models() -> dict[str, tuple[nn.Module, object]]:
    """The same model in place and through the backend, each with what runs it."""
    plain = Mlp()
    in_place = copy.deepcopy(plain)
    quantize_(in_place, TRAIN)
    through = copy.deepcopy(plain)
    return {"in place": (in_place, in_place), "backend": (through, compile_eager(through, **TRAIN))}


@pytest.mark.parametrize("which", ["in place", "backend"])
def test_train_and_eval_are_one_function_and_see_every_step(which):
    model, run = models()[which]
    x, y = activation(5, 24), torch.randn(5, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        out = run(x)
        model.eval()
        with torch.no_grad():
            assert torch.equal(run(x), out)
        model.train()
        assert torch.equal(run(x), out)
        loss = F.mse_loss(out, y)
        losses.append(loss.item())
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        assert not torch.equal(run(x), out)
    assert losses[-1] < 0.5 * losses[0]
    with torch.no_grad():
        expected = run(x).clone()
        model.up.weight.mul_(2.0)
        assert not torch.equal(run(x), expected)


def test_in_place_and_backend_are_the_same():
    found = models()
    x = activation(5, 24)
    outs, grads = [], []
    for model, run in found.values():
        out = run(x)
        out.square().sum().backward()
        outs.append(out)
        grads.append([p.grad for p in model.parameters()])
    assert torch.equal(*outs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    report = int8compile.last_report()
    assert [s.reason for s in report.sites] == [Reason.REWRITTEN] * 2
    targets = [str(n.target) for n in found["backend"][1].graphs[0].graph.nodes if "int8" in str(n.target)]
    assert targets == ["int8compile.master_linear.default"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_trains_through_inductor(kernels):
    model, x = Mlp(), activation(5, 24)
    reference = copy.deepcopy(model)
    quantize_(reference, TRAIN)
    compiled = torch.compile(model, backend="int8", options={**TRAIN, "kernels": kernels})
    for m, run in ((reference, reference), (model, compiled)):
        optimizer = torch.optim.SGD(m.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_accumulates_gradients():
    model, _ = models()["in place"]
    x = activation(6, 24)
    with torch.no_grad():  # the same outlier columns in each half
        x[:, 3] = 9.0
    model(x).sum().backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(set_to_none=False)
    for half in x.split(3):
        model(half).sum().backward()
    for p, want in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-3)


def test_gradient_checkpointing():
    model, _ = models()["in place"]
    x = activation(5, 24)
    model(x).square().sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    for p, grad in zip(model.parameters(), want, strict=True):
        assert torch.equal(p.grad, grad)


def test_autocast():
    model, _ = models()["in place"]
    x = activation(5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        assert (out - model(x)).norm() < 2e-2 * out.norm()


def test_goes_on_to_int8_and_back_to_float():
    model, _ = models()["in place"]
    x, weight = activation(5, 24), model.up.weight
    assert type(model.up) is Int8MasterLinear
    assert set(model.state_dict()) == set(Mlp().state_dict())
    assert quantize_(model, TRAIN).rewritten == 2
    assert model.up.weight is weight
    out = model(x)
    quantize_(deployed := copy.deepcopy(model), {"min_features": 0})
    assert type(deployed.up) is Int8Linear
    assert (deployed(x) - out).norm() < 2e-2 * out.norm()
    dequantize_(model)
    assert type(model.up) is nn.Linear
    assert model.up.weight is weight


def test_from_pretrained_and_a_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from model_zoo import ZOO

    from int8compile.integrations.transformers import Int8Config

    entry = next(entry for entry in ZOO if entry.name == "Llama")
    model, inputs = entry.make()
    model.save_pretrained(tmp_path / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=Int8Config(**TRAIN)
    )
    assert sum(isinstance(m, Int8MasterLinear) for m in model.modules()) == 14
    row = inputs["input_ids"][0]
    how = {"max_steps": 8, "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "use_cpu": True}
    arguments = transformers.TrainingArguments(tmp_path / "out", **how, disable_tqdm=True, save_strategy="no")
    data = [{"input_ids": row, "labels": row}] * 8
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    model.save_pretrained(tmp_path / "trained")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)
