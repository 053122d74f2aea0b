"""PyTorch's fused attention calls, taken apart: the same numbers, and their linears in int8."""

import pytest
import torch
from compiling import compile_eager
from torch import nn
from tracing import golden

from int8compile import last_report
from int8compile.report import Reason

E, HEADS = 32, 4
X = torch.randn(3, 6, E, generator=torch.Generator().manual_seed(0))
PADDING = torch.arange(6).expand(3, 6) >= torch.tensor([[6], [4], [2]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


@pytest.fixture(autouse=True)
def _inference():
    torch._dynamo.reset()  # the cases compile a few functions for many callers
    torch.manual_seed(0)
    with torch.no_grad():
        yield


class Attention(nn.Module):
    def __init__(self, **call):
        super().__init__()
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)
        self.call = call

    def forward(self, x):
        out, weights = self.attention(x, x, x, **self.call)
        return out if weights is None else torch.cat([out.flatten(), weights.flatten()])


class Layer(nn.Module):
    def __init__(self, activation="relu", norm_first=False, **call):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            E, HEADS, 64, batch_first=True, activation=activation, norm_first=norm_first
        )
        self.call = call

    def forward(self, x):
        return self.layer(x, **self.call)


CASES = {
    "attention": (lambda: Attention(need_weights=False), 2),
    "its weights": (Attention, 2),
    "weights of each head": (lambda: Attention(average_attn_weights=False), 2),
    "mask of floats": (lambda: Attention(attn_mask=CAUSAL, need_weights=False), 2),
    "mask of bools": (lambda: Attention(attn_mask=CAUSAL < 0), 2),
    "padding": (lambda: Attention(key_padding_mask=PADDING), 2),
    "mask and padding": (lambda: Attention(attn_mask=CAUSAL < 0, key_padding_mask=PADDING), 2),
    "layer": (Layer, 4),
    "layer, norm first, gelu": (lambda: Layer("gelu", True), 4),
    "layer, mask": (lambda: Layer(src_mask=CAUSAL), 4),
    "layer, padding": (lambda: Layer(src_key_padding_mask=PADDING), 4),
    "layer, both": (lambda: Layer("gelu", src_mask=CAUSAL < 0, src_key_padding_mask=PADDING), 4),
}


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_computes_the_same_and_frees_the_linears(case, fast_path):
    make, linears = CASES[case]
    model = make().eval()
    torch.backends.mha.set_fastpath_enabled(fast_path)
    try:
        want = model(X)
        for skip, rewritten in ((["*"], 0), ([], linears)):
            compiled = compile_eager(model, llm_int8_skip_modules=skip)
            out = compiled(X)
            assert last_report().rewritten == rewritten
            assert {s.reason for s in last_report().sites} == {Reason.REWRITTEN if rewritten else Reason.SKIPPED}
            torch.testing.assert_close(out, want, rtol=0, atol=2e-6 if not rewritten else 5e-2)
            assert rewritten == 0 or not torch.equal(out, want)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_sites_bear_the_names_of_their_parameters():
    compiled = compile_eager(nn.TransformerEncoder(Layer().layer, 2, enable_nested_tensor=False).eval())
    compiled(X)
    assert [s.path for s in last_report().sites] == [
        f"layers.{i}.{name}"
        for i in range(2)
        for name in ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    ]


def test_batch_and_sequence_may_be_dynamic():
    model = Layer().eval()
    compiled = compile_eager(model, llm_int8_skip_modules=["*"])
    for shape in ((3, 6, E), (2, 9, E), (5, 4, E)):
        x = torch.randn(shape)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=2e-6)
    assert len(last_report().graphs) == 1


def test_training_keeps_dropout():
    model = nn.MultiheadAttention(E, HEADS, dropout=0.5, batch_first=True).train().requires_grad_(False)
    compiled = compile_eager(model)
    outs = [compiled(X, X, X)[0] for _ in range(2)]
    assert last_report().rewritten == 2
    assert not torch.equal(*outs)


@pytest.mark.parametrize("inputs", ["query, key", "query, key, value"])
def test_cross_attention_multiplies_by_rows_of_one_parameter(inputs):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y if inputs == "query, key" else y + 1, need_weights=False)[0]

    model, y = Cross().eval(), torch.randn(3, 9, E)
    compiled = compile_eager(model)
    out = compiled(X, y)
    third = ("attention.in_proj_weight", E, E)
    thirds = [third, ("attention.in_proj_weight", E, 2 * E)] if inputs == "query, key" else [third] * 3
    sites = [(s.path, s.in_features, s.out_features) for s in last_report().sites if s.rewritten]
    assert sites == [*thirds, ("attention.out_proj", E, E)]
    torch.testing.assert_close(out, model(X, y), rtol=0, atol=5e-2)


@pytest.mark.parametrize("make", [Attention, Layer])
def test_left_whole_when_disabled(make):
    model = make().eval()
    out = compile_eager(model, disable_passes=["expand"])(X)
    assert {s.reason for s in last_report().sites} == {Reason.FUSED}
    assert torch.equal(out, model(X))


def test_golden():
    class Attend(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            weights = (self.a.in_proj_weight, self.a.in_proj_bias, None, None, False, 0.0)
            out = (self.a.out_proj.weight, self.a.out_proj.bias)
            return nn.functional.multi_head_attention_forward(x, x, x, 8, 2, *weights, *out, need_weights=False)[0]

    text = golden(Attend(), torch.randn(5, 3, 8), dynamic=True)
    assert text.count("int8compile.linear") == 2
    assert text.count("aten.scaled_dot_product_attention") == 1
    assert "multi_head_attention_forward" not in text
