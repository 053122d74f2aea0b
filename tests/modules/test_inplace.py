"""``quantize_`` and ``dequantize_``: which linears, ties, hooks, memory, and that nothing else changes."""

import copy
import pickle
import weakref

import pytest
import torch
from compiling import compile_eager
from torch import nn

import int8compile
from int8compile import Int8Linear, Reason, dequantize_, quantize_
from int8compile.errors import ModuleError, OptionNameError

ALL = {"min_features": 0}


class Conv1D(nn.Module):
    """What transformers has under this name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Zoo(nn.Module):
    """A linear of every kind, 128 features wide where nothing else is said."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(200, 128)
        self.body = nn.ModuleList([nn.Linear(128, 128), Conv1D(128, 128)])
        self.again = self.body[0]
        self.twin = nn.Linear(128, 128)
        self.twin.weight = self.body[0].weight
        self.small = nn.Linear(128, 64)
        self.double = nn.Linear(128, 128, dtype=torch.float64)
        self.scaled = Scaled(128, 128)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(128, 128))
        self.attention = nn.MultiheadAttention(128, 2)
        self.tied = nn.Linear(128, 200, bias=False)
        self.tied.weight = self.embed.weight
        self.lm_head = nn.Linear(128, 128)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in (*self.body, self.again, self.twin):
            x = torch.tanh(layer(x))
        return self.small(x), self.tied(x), self.lm_head(x)


def test_each_linear_has_its_reason():
    report = quantize_(Zoo(), {"llm_int8_skip_modules": ["body.1", "nothing"]})
    assert {site.path: site.reason for site in report.sites} == {
        "body.0": Reason.REWRITTEN,
        "body.1": Reason.SKIPPED,
        "twin": Reason.REWRITTEN,
        "small": Reason.TOO_SMALL,
        "double": Reason.DTYPE,
        "scaled": Reason.CUSTOM,
        "normed": Reason.NOT_CONSTANT,
        "attention.out_proj": Reason.FUSED,
        "tied": Reason.OUTPUT_EMBEDDING,
        "lm_head": Reason.OUTPUT_EMBEDDING,
    }
    assert report.unmatched == ["nothing"]
    assert report.weight_bytes_after < report.weight_bytes_before
    text = str(report)
    assert "2 of 10 linears" in text
    assert "graph" not in text.replace("graphs", "graph").split("2 of 10")[1].split("\n")[1]


def test_agrees_with_the_backend_about_the_same_model():
    model, tokens = Zoo().eval().requires_grad_(False), torch.randint(0, 200, (3, 5))
    options = {**ALL, "llm_int8_skip_modules": ["body.1"]}
    compiled = compile_eager(model, llm_int8_skip_modules=["body.1"])
    outs = compiled(tokens)
    backend = {site.path: site.reason for site in int8compile.last_report().sites}
    mine = {site.path: site.reason for site in quantize_(model, options).sites}
    assert {path: mine[path] for path in backend if path in mine} == {p: r for p, r in backend.items() if p in mine}
    assert {"body.0", "body.1", "small", "tied", "lm_head"} <= set(backend)
    for got, want in zip(outs, model(tokens), strict=True):
        assert torch.equal(got, want)


def test_ties_and_shared_modules_stay():
    model = Zoo()
    quantize_(model)
    assert model.again is model.body[0]
    assert model.twin.weight is model.body[0].weight
    assert model.tied.weight is model.embed.weight
    assert dequantize_(model) == 3
    assert model.again is model.body[0]
    assert model.twin.weight is model.body[0].weight
    assert isinstance(model.body[1], Conv1D)


def test_a_tied_output_embedding_on_request():
    model = Zoo()
    quantize_(model, {"skip_output_embeddings": False})
    assert isinstance(model.tied, Int8Linear)
    assert isinstance(model.lm_head, Int8Linear)
    assert model.embed.weight.dtype == torch.float32


def test_weights_only_where_named_output_embeddings_included():
    model, tokens = Zoo().eval().requires_grad_(False), torch.randint(0, 200, (3, 5))
    options = {"llm_int8_weight_only_modules": ["tied", "lm_head", "again"], "llm_int8_skip_modules": ["lm_head"]}
    compile_eager(model, **options)(tokens)
    backend = {site.path: site.detail for site in int8compile.last_report().sites if site.rewritten}
    report = quantize_(model, {**ALL, **options})
    policies = {path: m.outlier_policy for path, m in model.named_modules() if isinstance(m, Int8Linear)}
    assert policies == {"body.0": "all", "body.1": "column", "twin": "column", "small": "column", "tied": "all"}
    assert type(model.lm_head) is nn.Linear
    assert model.embed.weight.dtype == torch.float32
    details = {site.path: site.detail for site in report.sites if site.rewritten}
    assert details == {path: "weights only" if policy == "all" else "" for path, policy in policies.items()}
    assert backend["tied"] == "weights only"
    assert "lm_head" not in backend


def test_conv1d_and_back():
    model, x = nn.Sequential(Conv1D(24, 40)), torch.randn(3, 5, 40)
    before = model(x)
    quantize_(model, ALL)
    assert tuple(model[0].weight.shape) == (24, 40)
    out = model(x)
    assert (out - before).norm() < 0.02 * before.norm()
    dequantize_(model)
    assert isinstance(model[0], Conv1D)
    assert tuple(model[0].weight.shape) == (40, 24)
    assert (model(x) - before).norm() < 0.02 * before.norm()


def test_hooks_mode_and_bias_are_kept():
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    bias = model[0].bias
    seen = []
    model[0].register_forward_hook(lambda m, args, out: seen.append(type(m)))
    quantize_(model, ALL)
    assert model[0].bias is bias
    assert bias.requires_grad
    assert not model[0].training
    model(torch.randn(2, 16))
    assert seen == [Int8Linear]


def test_dequantize_to_a_dtype():
    model = nn.Sequential(nn.Linear(16, 16)).to(torch.bfloat16)
    quantize_(model, ALL)
    dequantize_(copied := copy.deepcopy(model), torch.float32)
    assert {p.dtype for p in copied.parameters()} == {torch.float32}
    dequantize_(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_meta_skeleton_takes_a_state_dict():
    model, tokens = Zoo(), torch.randint(0, 200, (3, 5))
    with torch.device("meta"):
        skeleton = Zoo()
    quantize_(model)
    quantize_(skeleton)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert skeleton.body[0].weight.data_ptr() == model.body[0].weight.data_ptr()
    for got, want in zip(skeleton(tokens), model(tokens), strict=True):
        assert torch.equal(got, want)


def test_whole_models_copy_and_pickle():
    model, tokens = Zoo(), torch.randint(0, 200, (3, 5))
    quantize_(model)
    del model.scaled, model.normed
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(other(tokens), model(tokens), strict=True))


def test_twice_is_once():
    model = Zoo()
    quantize_(model)
    weight = model.body[0].weight
    report = quantize_(model)
    assert model.body[0].weight is weight
    assert [s.reason for s in report.sites][:2] == [Reason.PREQUANTIZED] * 2
    assert report.rewritten == 3


def test_wrong_input_changes_nothing():
    model = Zoo()
    with pytest.raises(OptionNameError, match="Did you mean 'llm_int8_threshold'"):
        quantize_(model, {"int8_threshold": 5.0})
    assert not any(isinstance(m, Int8Linear) for m in model.modules())
    with pytest.raises(ModuleError, match=r"Int8Linear\.from_float"):
        quantize_(nn.Linear(128, 128))
    with pytest.raises(ModuleError, match=r"model\.to_float"):
        dequantize_(Int8Linear(4, 4))
    with pytest.raises(ModuleError, match=r"expected a torch\.nn\.Module"):
        quantize_([1, 2])
    quantize_(model)
    with pytest.raises(ModuleError, match="expected a floating-point dtype"):
        dequantize_(model, torch.int32)
    assert isinstance(model.twin, Int8Linear)


def test_a_compiled_model_can_be_quantised():
    model, x = nn.Sequential(nn.Linear(16, 16)).requires_grad_(False), torch.randn(2, 16)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    quantize_(compiled, ALL)
    assert torch.equal(compiled(x), model(x))
    assert isinstance(model[0], Int8Linear)


def test_memory_ends_at_a_quarter_and_never_holds_two_models():
    width, layers = 1024, 8
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    freed = []
    for layer in model:
        weakref.finalize(layer.weight, lambda: freed.append(sum(isinstance(m, Int8Linear) for m in model)))
    del layer
    quantize_(model)
    # Each float weight goes when its successor is in place, before the next is begun.
    assert freed == list(range(1, layers + 1))
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert held == layers * (width * width + 4 * width)
