"""Linears of which the weights alone are int8: which sites they are, what they become, and what is not shared."""

from __future__ import annotations

import pytest
import torch
from compiling import compile_eager
from expecttest import TestCase
from torch import nn
from tracing import golden, rewrite

import int8compile
from int8compile import Reason
from int8compile.ops import linear, quantize_rowwise, quantize_weight, scaled_mm

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Three readers of one activation, and an output embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, n, bias=False) for n in (4, 5, 6))
        self.lm_head = nn.Linear(3, 7)
        self.requires_grad_(False)

    def forward(self, x):
        return self.q(x), self.k(x), self.v(x), self.lm_head(x * 2)


class TestWeightsOnly(TestCase):
    def test_named_ones_are_joined_with_their_like_and_quantise_nothing(self):
        self.assertExpectedInline(
            golden(Attention(), X, llm_int8_weight_only_modules=["q", "v"]),
            """\
%0 = input : f32[5, 3]
%1 = weight "lm_head.weight" : f32[7, 3]
%2 = weight "lm_head.bias" : f32[7]
%3 = int8 "k.weight" : i8[5, 3]
%4 = scale "k.weight" : f32[5]
%5 = int8 "q.weight+v.weight" : i8[10, 3]
%6 = scale "q.weight+v.weight" : f32[10]
%7 = int8compile.linear(%0, %5, %6, None, 0, 'all') : f32[5, 10]
%8 = aten.narrow(%7, -1, 0, 4) : f32[5, 4]
%9 = aten.clone(%8, memory_format=torch.contiguous_format) : f32[5, 4]
%10 = aten.narrow(%7, -1, 4, 6) : f32[5, 6]
%11 = aten.clone(%10, memory_format=torch.contiguous_format) : f32[5, 6]
%12 = int8compile.linear(%0, %3, %4, None, 6, 'column') : f32[5, 5]
%13 = operator.mul(%0, 2) : f32[5, 3]
%14 = aten.linear(%13, %1, %2) : f32[5, 7]
return (%9, %12, %11, %14)
""",
        )

    def test_one_of_two_readers(self):
        """The other has its activation to itself: nothing to share."""
        graph = rewrite(Attention(), X, llm_int8_weight_only_modules=["q", "k"])[0].graph
        assert not graph.find_nodes(op="call_function", target=quantize_rowwise)

    def test_every_site_on_request(self):
        capture, context = rewrite(Attention(), X, activation="float", disable_passes=["merge"])
        calls = capture.graph.find_nodes(op="call_function", target=linear)
        assert [node.args[4:] for node in calls] == [(0.0, "all")] * 3
        assert not capture.graph.find_nodes(op="call_function", target=scaled_mm)
        assert [site.detail for site in context.sites.values()] == ["weights only"] * 3 + [""]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, ["int8"] * 3 + ["float: OUTPUT_EMBEDDING"]),
        ({"activation": "float"}, ["int8, weights only"] * 3 + ["float: OUTPUT_EMBEDDING"]),
        ({"activation": "float", "skip_output_embeddings": False}, ["int8, weights only"] * 4),
        # naming it takes an output embedding; skipping wins
        ({"llm_int8_weight_only_modules": ["lm_head"]}, ["int8"] * 3 + ["int8, weights only"]),
        (
            {"llm_int8_weight_only_modules": ["lm_head", "[qk]"], "llm_int8_skip_modules": ["lm_head", "k"]},
            ["int8, weights only", "float: SKIPPED k", "int8", "float: SKIPPED lm_head"],
        ),
    ],
)
def test_which_sites(options, want):
    report = int8compile.explain(Attention(), X, options={"min_features": 0, "kernels": "reference", **options})
    lines = [line for line in str(report).splitlines() if "float32" in line]
    assert [line.split("float32")[1].strip() for line in lines] == want
    assert report.rewritten == sum(text.startswith("int8") for text in want)


def test_names_that_are_typos_are_said(caplog):
    compile_eager(Attention(), llm_int8_weight_only_modules=["lm_haed"])(X)
    assert "llm_int8_weight_only_modules that name no linear: lm_haed" in caplog.text
    assert int8compile.last_report().unmatched == ["lm_haed"]


def test_what_is_computed():
    model = Attention()
    outs = compile_eager(model, llm_int8_weight_only_modules=["k", "lm_head"])(X)
    for name, out, x in (("k", outs[1], X), ("lm_head", outs[3], X * 2)):
        module = model.get_submodule(name)
        codes, scale = quantize_weight(module.weight)
        want = x.double() @ (codes.double() * scale.double()[:, None]).t()
        want = want if module.bias is None else want + module.bias.double()
        torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


def test_rows_of_a_weight_say_both():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 3), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight[:4])

    context = rewrite(Rows(), X, activation="float")[1]
    assert [(s.reason, s.detail) for s in context.sites.values()] == [(Reason.REWRITTEN, "rows 0:4, weights only")]
