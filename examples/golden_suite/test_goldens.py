"""Goldens of a model of one's own. README.md is the guide; EXPECTTEST_ACCEPT=1 rewrites the texts."""

import unittest

import torch
from torch import nn
from torch.nn import functional as F

from int8compile.testing import assert_int8_graph, assert_int8_sites, assert_op_counts

# The blocks here are small, so nothing may be too small. A suite of a real model takes the model's real options.
CONFIG = {"min_features": 0}


class FeedForward(nn.Module):
    """The gated feed-forward block of the Llama family."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Classifier(nn.Module):
    """Some such blocks between an embedding and a head that is tied to it."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(FeedForward(16, 32) for _ in range(layers))
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def test_feed_forward() -> None:
    """Gate and up read one activation: one quantisation, one product of both."""
    assert_int8_graph(
        FeedForward(16, 32),
        (torch.ones(4, 16),),
        """\
# int8compile graph, version 1
%0 = input : f32[s0, 16]
%1 = int8 "down.weight" : i8[16, 32]
%2 = scale "down.weight" : f32[16]
%3 = int8 "gate.weight+up.weight" : i8[64, 16]
%4 = scale "gate.weight+up.weight" : f32[64]
%5 = int8compile.linear(%0, %3, %4, None, 6, 'column') : f32[s0, 64]
%6 = aten.narrow(%5, -1, 0, 32) : f32[s0, 32]
%7 = aten.clone(%6, memory_format=torch.contiguous_format) : f32[s0, 32]
%8 = aten.narrow(%5, -1, 32, 32) : f32[s0, 32]
%9 = aten.clone(%8, memory_format=torch.contiguous_format) : f32[s0, 32]
%10 = torch.nn.functional.silu(%7, inplace=False) : f32[s0, 32]
%11 = operator.mul(%10, %9) : f32[s0, 32]
%12 = int8compile.linear(%11, %1, %2, None, 6, 'column') : f32[s0, 16]
return %12
""",
        config=CONFIG,
        dynamic=True,
    )


def test_down_stays_float_where_it_is_skipped() -> None:
    config = {**CONFIG, "llm_int8_skip_modules": ["down"]}
    assert_int8_graph(
        FeedForward(16, 32),
        (torch.ones(4, 16),),
        """\
# int8compile graph, version 1
%0 = input : f32[4, 16]
%1 = weight "down.weight" : f32[16, 32]
%2 = int8 "gate.weight+up.weight" : i8[64, 16]
%3 = scale "gate.weight+up.weight" : f32[64]
%4 = int8compile.linear(%0, %2, %3, None, 6, 'column') : f32[4, 64]
%5 = aten.narrow(%4, -1, 0, 32) : f32[4, 32]
%6 = aten.clone(%5, memory_format=torch.contiguous_format) : f32[4, 32]
%7 = aten.narrow(%4, -1, 32, 32) : f32[4, 32]
%8 = aten.clone(%7, memory_format=torch.contiguous_format) : f32[4, 32]
%9 = torch.nn.functional.silu(%6, inplace=False) : f32[4, 32]
%10 = operator.mul(%9, %8) : f32[4, 32]
%11 = aten.linear(%10, %1, None) : f32[4, 16]
return %11
""",
        config=config,
    )


def test_which_linears_run_in_int8() -> None:
    assert_int8_sites(
        Classifier(),
        (torch.tensor([[1, 2, 3]]),),
        """\
2x layers.*.gate 16 -> 32 float32 int8
2x layers.*.up 16 -> 32 float32 int8
2x layers.*.down 32 -> 16 float32 int8
1x head 16 -> 50 float32 OUTPUT_EMBEDDING
""",
        config=CONFIG,
    )


class TestWithUnittest(unittest.TestCase):
    def test_op_counts(self) -> None:
        """Two layers of gate and up as one, and down; the head is left in float."""
        expected = {"int8compile.linear": 4, "int8compile.scaled_mm": 0, "aten.linear": 1}
        assert_op_counts(Classifier(), (torch.tensor([[1, 2, 3]]),), expected, config=CONFIG)

    def test_feed_forward_in_bfloat16(self) -> None:
        x = torch.ones(4, 16, dtype=torch.bfloat16)
        assert_int8_graph(
            FeedForward(16, 32).bfloat16(),
            (x,),
            """\
# int8compile graph, version 1
%0 = input : bf16[4, 16]
%1 = int8 "down.weight" : i8[16, 32]
%2 = scale "down.weight" : f32[16]
%3 = int8 "gate.weight+up.weight" : i8[64, 16]
%4 = scale "gate.weight+up.weight" : f32[64]
%5 = int8compile.linear(%0, %3, %4, None, 6, 'column') : bf16[4, 64]
%6 = aten.narrow(%5, -1, 0, 32) : bf16[4, 32]
%7 = aten.clone(%6, memory_format=torch.contiguous_format) : bf16[4, 32]
%8 = aten.narrow(%5, -1, 32, 32) : bf16[4, 32]
%9 = aten.clone(%8, memory_format=torch.contiguous_format) : bf16[4, 32]
%10 = torch.nn.functional.silu(%7, inplace=False) : bf16[4, 32]
%11 = operator.mul(%10, %9) : bf16[4, 32]
%12 = int8compile.linear(%11, %1, %2, None, 6, 'column') : bf16[4, 16]
return %12
""",
            config=CONFIG,
        )


if __name__ == "__main__":
    unittest.main()
