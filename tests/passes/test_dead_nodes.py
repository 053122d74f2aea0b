"""What a pass leaves unread is removed; what was the user's own, or may do more than compute its value, stays."""

from __future__ import annotations

import pytest
import torch
from compiling import compile_eager
from torch import nn
from torch.nn import functional as F
from tracing import golden, rewrite

from int8compile import last_report
from int8compile.graph.dump import target_name
from int8compile.passes.analysis.effects import only_computes

X = torch.ones(2, 3)


class Calls(nn.Module):
    """A function of x, two float weights and an int8 weight with its scale."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.w1, self.w2 = (nn.Parameter(torch.ones(4, 3), requires_grad=False) for _ in range(2))
        self.register_buffer("codes", torch.ones(4, 3, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x):
        return self.function(self, x)


def targets(function, **options) -> list[str]:
    graph = rewrite(Calls(function), X, **options)[0].graph
    return [target_name(n.target) for n in graph.nodes if n.op in ("call_function", "call_method")]


def test_the_users_own_dead_nodes_stay():
    """(1) an operation (2) a transpose of a weight (3) a linear (4) an int8 linear, however it is written"""

    def operation(m, x):
        x * 2
        return F.linear(x, m.w1)

    def transpose(m, x):
        m.w1.t()
        return F.linear(x, m.w1)

    def float_linear(m, x):
        F.linear(x, m.w2)
        return F.linear(x, m.w1)

    def int8_linear(m, x):
        torch.ops.int8compile.linear(x, m.codes, m.scale, bias=None, threshold=6.0)
        torch.ops.int8compile.linear.default(x, m.codes, m.scale, None, 6.0, "column")
        return x @ m.w1.t()

    assert targets(operation) == ["operator.mul", "int8compile.linear"]
    assert targets(transpose) == ["t", "int8compile.linear"]
    assert targets(float_linear) == ["torch._C._nn.linear", "int8compile.linear"]
    assert targets(int8_linear) == ["int8compile.linear"] * 3  # what nobody reads shares no activation


def test_what_lost_its_last_reader_goes_and_what_another_reads_stays():
    def chain(m, x):
        return F.linear(x, m.w1.t().t()[:].detach()), F.linear(x, m.w2.split([1, 3])[1])

    def read(m, x):
        turned = m.w1.t()
        return x @ turned, turned

    # The float weights' views are gone; these are of the int8 weight and its scales.
    assert targets(chain, upto="quantize") == ["aten.slice.Tensor", "aten.slice.Tensor", "int8compile.linear"] * 2
    assert targets(read, upto="quantize") == ["t", "int8compile.linear"]


@pytest.mark.parametrize("disabled", [["merge"], []])
def test_no_mask_is_left_where_there_are_no_outliers(disabled):
    text = golden(
        Calls(lambda m, x: (F.linear(x, m.w1), x @ m.w2.t())), X, llm_int8_threshold=0, disable_passes=disabled
    )
    assert text.count("operator.getitem") == (2 if disabled else 0)


@pytest.mark.parametrize(
    ("function", "alone"),
    [
        (lambda m, x: x + 1, True),
        (lambda m, x: x.t(), True),
        (lambda m, x: x.T, True),
        (lambda m, x: torch.split(x, 1), True),
        (lambda m, x: F.relu(x), True),
        (lambda m, x: torch.ops.aten.squeeze.dim(x, 0), True),
        (lambda m, x: torch.ops.int8compile.quantize_rowwise(x, 6.0), True),
        (lambda m, x: x.add_(1), False),
        (lambda m, x: F.relu(x, inplace=True), False),
        (lambda m, x: torch.add(x, 1, out=x), False),
        (lambda m, x: torch.rand_like(x), False),
        (lambda m, x: x.bernoulli(), False),
        (lambda m, x: F.dropout(x, 0.5, True), False),
        (lambda m, x: torch._assert_async(x.sum()), False),
    ],
)
def test_which_calls_only_compute_their_value(function, alone):
    node = rewrite(Calls(function), X, upto="expand")[0].graph.output_node().all_input_nodes[0]
    assert only_computes(node) is alone


def test_a_call_of_a_function_that_is_not_known_does_more():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert not only_computes(graph.call_function(lambda x: x, (x,)))
    assert not only_computes(graph.call_method("write_to_disk", (x,)))
    assert not only_computes(x)


def test_a_fused_call_whose_output_nothing_reads_is_left_and_reported():
    attention = nn.MultiheadAttention(4, 2).requires_grad_(False)
    projections = (attention.in_proj_weight, attention.in_proj_bias)
    output = (attention.out_proj.weight, attention.out_proj.bias)

    def weights_alone(m, x):
        return F.multi_head_attention_forward(x, x, x, 4, 2, *projections, None, None, False, 0.0, *output)[1]

    model = Calls(weights_alone)
    model.attention = attention
    x = torch.randn(5, 2, 4)
    with torch.no_grad():
        assert torch.equal(compile_eager(model)(x), model(x))
    assert {site.reason.name for site in last_report().sites} == {"FUSED"}


def test_an_unread_linear_is_reported_whatever_its_weight():
    model = Calls(lambda m, x: (F.linear(x, m.vector), F.linear(x, m.w1))[1])
    model.vector = nn.Parameter(torch.ones(3), requires_grad=False)
    sites = list(rewrite(model, X)[1].sites.values())
    assert [(s.path, s.in_features, s.out_features, s.reason.name) for s in sites] == [
        ("vector", 3, 0, "UNREAD"),
        ("w1", 3, 4, "REWRITTEN"),
    ]
