"""``merge`` before ``share``: what can be joined is, and one quantise serves the joined product and the rest."""

from __future__ import annotations

import pytest
import torch
from expecttest import TestCase
from torch import nn
from torch.nn import functional as F
from tracing import golden, rewrite

from int8compile.ops import linear, quantize_rowwise, scaled_mm
from int8compile.passes import PIPELINE

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


class PartlyJoinable(nn.Module):
    """q and v can be joined; k cannot, since its bias is computed from q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, n, bias=False) for n in (4, 5, 6))
        self.requires_grad_(False)

    def forward(self, x):
        q = self.q(x)
        return q, F.linear(x, self.k.weight, q.sum(0)[:1].expand(5)), self.v(x)


class OwnInt8(nn.Module):
    """An int8 weight of the user's own between two float ones."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(3, 4, bias=False), nn.Linear(3, 6, bias=False)
        self.register_buffer("codes", torch.ones(5, 3, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(5))
        self.requires_grad_(False)

    def forward(self, x):
        own = torch.ops.int8compile.linear(x=x, weight=self.codes, weight_scale=self.scale, bias=None, threshold=6.0)
        return self.q(x), own, self.v(x)


class Twice(nn.Module):
    """One weight, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(3, 4, bias=False).requires_grad_(False)

    def forward(self, x):
        return self.q(x), self.q(x)


class TestReaders(TestCase):
    def test_a_weight_is_not_joined_with_itself(self):
        """It would be held twice."""
        text = golden(Twice(), X)
        assert "q.weight+q.weight" not in text
        assert text.count("scaled_mm(") == 2

    def test_some_join_and_one_is_left(self):
        self.assertExpectedInline(
            golden(PartlyJoinable(), X),
            """\
%0 = input : f32[5, 3]
%1 = int8 "k.weight" : i8[5, 3]
%2 = scale "k.weight" : f32[5]
%3 = int8 "q.weight+v.weight" : i8[10, 3]
%4 = scale "q.weight+v.weight" : f32[10]
%5 = int8compile.quantize_rowwise(%0, 6) : (i8[5, 3], f32[5], bool[3])
%6 = operator.getitem(%5, 0) : i8[5, 3]
%7 = operator.getitem(%5, 1) : f32[5]
%8 = operator.getitem(%5, 2) : bool[3]
%9 = int8compile.scaled_mm(%6, %7, %0, %8, %3, %4, None, f32, 0) : f32[5, 10]
%10 = aten.narrow(%9, -1, 0, 4) : f32[5, 4]
%11 = aten.clone(%10, memory_format=torch.contiguous_format) : f32[5, 4]
%12 = aten.narrow(%9, -1, 4, 6) : f32[5, 6]
%13 = aten.clone(%12, memory_format=torch.contiguous_format) : f32[5, 6]
%14 = %11.sum(0) : f32[4]
%15 = operator.getitem(%14, :1:) : f32[1]
%16 = %15.expand(5) : f32[5]
%17 = int8compile.scaled_mm(%6, %7, %0, %8, %1, %2, %16, f32, 0) : f32[5, 5]
return (%11, %17, %13)
""",
        )

    def test_a_weight_of_the_users_own_is_never_copied(self):
        self.assertExpectedInline(
            golden(OwnInt8(), X),
            """\
%0 = input : f32[5, 3]
%1 = weight "codes" : i8[5, 3]
%2 = weight "scale" : f32[5]
%3 = int8 "q.weight+v.weight" : i8[10, 3]
%4 = scale "q.weight+v.weight" : f32[10]
%5 = int8compile.quantize_rowwise(%0, 6) : (i8[5, 3], f32[5], bool[3])
%6 = operator.getitem(%5, 0) : i8[5, 3]
%7 = operator.getitem(%5, 1) : f32[5]
%8 = operator.getitem(%5, 2) : bool[3]
%9 = int8compile.scaled_mm(%6, %7, %0, %8, %1, %2, None, f32, 0) : f32[5, 5]
%10 = int8compile.scaled_mm(%6, %7, %0, %8, %3, %4, None, f32, 0) : f32[5, 10]
%11 = aten.narrow(%10, -1, 0, 4) : f32[5, 4]
%12 = aten.clone(%11, memory_format=torch.contiguous_format) : f32[5, 4]
%13 = aten.narrow(%10, -1, 4, 6) : f32[5, 6]
%14 = aten.clone(%13, memory_format=torch.contiguous_format) : f32[5, 6]
return (%12, %9, %14)
""",
        )

    def test_the_outlier_policy_is_kept(self):
        text = golden(PartlyJoinable(), X, upto="merge", outlier_policy="element", llm_int8_threshold=0)
        assert text.count("'element'") == 2


def test_the_order_of_the_pipeline():
    names = [p.__name__ for p in PIPELINE]
    first = ["expand", "group_heads", "attend", "fold_queries", "normalize"]
    assert names == [*first, "quantize", "experts", "merge", "share", "verify"]


@pytest.mark.parametrize(
    ("disabled", "linears", "quantises", "products"),
    [
        ([], 0, 1, 2),
        (["merge"], 0, 1, 3),
        (["share"], 2, 0, 0),
        (["merge", "share"], 3, 0, 0),
    ],
)
@pytest.mark.parametrize("module", [PartlyJoinable, OwnInt8])
def test_either_pass_works_without_the_other(module, disabled, linears, quantises, products):
    graph = rewrite(module(), X, disable_passes=disabled)[0].graph
    for target, count in ((linear, linears), (quantize_rowwise, quantises), (scaled_mm, products)):
        assert len(graph.find_nodes(op="call_function", target=target)) == count, target
