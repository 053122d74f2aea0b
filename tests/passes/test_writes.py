"""Every kind of write at every place that a pass looks at: int8 sees what eager sees.

The table is WRITES x PLACES. Each program is run by the passes and then eagerly, next to the float program; a pass that
read too early, or took a changed weight for a constant, is off by far more than quantisation is.
"""

from __future__ import annotations

import pytest
import torch
from compiling import compile_eager
from torch import nn
from torch.nn import functional as F
from writes import WRITES

from int8compile import last_report

K, N = 16, 24


def codes(*shape: int, seed: int) -> torch.Tensor:
    """Integers up to 127, which every row reaches: int8 holds them as they are."""
    values = torch.randint(-100, 101, shape, generator=torch.Generator().manual_seed(seed)).float()
    values[..., 0] = 127.0
    return values


class Block(nn.Module):
    """A function of the module, a write and inputs."""

    def __init__(self, function, write) -> None:
        super().__init__()
        self.function, self.write = function, write
        for i in (1, 2, 3):
            self.register_parameter(f"w{i}", nn.Parameter(codes(N, K, seed=i), requires_grad=False))
            self.register_buffer(f"b{i}", codes(N, seed=10 + i) * 1000)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def weight(m, x):
    first = F.linear(x, m.w1, m.b1)
    m.write(m.w1)
    return first, F.linear(x, m.w1, m.b1)


def weight_after_its_transpose(m, x):
    turned = m.w1.t()
    m.write(m.w1)
    return x @ turned


def transpose_of_weight(m, x):
    m.write(m.w1.t())
    return F.linear(x, m.w1), F.linear(x, m.w2)


def rows_of_weight(m, x):
    part = m.w1[4:12]
    m.write(part)
    return F.linear(x, part), F.linear(x, m.w2)


def rows_of_a_written_weight(m, x):
    part = m.w1[4:12]
    m.write(m.w1)
    return F.linear(x, part), F.linear(x, m.w1)


def shared_activation(m, x):
    first = F.linear(x, m.w1)
    m.write(x)
    return first, F.linear(x, m.w2), x


def view_of_shared_activation(m, x):
    flat = x.view(-1)
    first = F.linear(x, m.w1)
    m.write(flat)
    return first, F.linear(x, m.w2), F.linear(x, m.w3)


def computed_activation(m, x):
    h = x * 2
    first, second = F.linear(h, m.w1, m.b1), F.linear(h, m.w2, m.b2)
    m.write(h)
    return first, second, F.linear(h, m.w3, m.b3)


def bias_of_a_joined_product(m, x):
    first = F.linear(x, m.w1, m.b1)
    m.write(m.b2)
    return first, F.linear(x, m.w2, m.b2)


def bias_of_addmm(m, x):
    first = torch.addmm(m.b1, x, m.w1.t())
    m.write(m.b2)
    return first, torch.addmm(m.b2, x, m.w2.t())


def activation_through_a_dropout_without_effect(m, x):
    same = F.dropout(x, 0.5, False)
    first = F.linear(x, m.w1)
    m.write(same)
    return first, F.linear(x, m.w2)


def computed_bias(m, x):
    bias = m.b2 * 2
    first = F.linear(x, m.w1, bias)
    m.write(bias)
    return first, F.linear(x, m.w2, bias)


def output(m, x):
    first = F.linear(x, m.w1)
    view = first.view(-1)
    m.write(first)
    return first, view * 1, F.linear(x, m.w2)


def output_that_is_read(m, x):
    first, second = F.linear(x, m.w1, m.b1), F.linear(x, m.w2, m.b2)
    h = first[..., :K]
    third = F.linear(h, m.w2)
    m.write(second)
    m.write(first)
    return third, F.linear(h, m.w3), second


def _attend(m, x, which):
    heads = (x[:, None] * torch.ones(2, 2, 1, 1)).view(2, 2, 3, K)
    k, v = heads * 1, heads * 2
    copies = [t[:, :, None].expand(2, 2, 2, 3, K).reshape(2, 4, 3, K) for t in (k, v)]
    m.write({"heads": v, "copies": copies[1], "view": copies[1][:, 1:]}[which])
    query = torch.ones(2, 4, 3, K) / 127
    return F.scaled_dot_product_attention(query, *copies, scale=0.5), v


def heads_of_attention(m, x):
    return _attend(m, x.view(1, 3, K), "heads")


def copies_of_heads(m, x):
    return _attend(m, x.view(1, 3, K), "copies")


def view_of_copies_of_heads(m, x):
    return _attend(m, x.view(1, 3, K), "view")


PLACES = {
    f.__name__: f
    for f in (
        weight,
        weight_after_its_transpose,
        transpose_of_weight,
        rows_of_weight,
        rows_of_a_written_weight,
        shared_activation,
        view_of_shared_activation,
        computed_activation,
        bias_of_a_joined_product,
        bias_of_addmm,
        activation_through_a_dropout_without_effect,
        computed_bias,
        output,
        output_that_is_read,
        heads_of_attention,
        copies_of_heads,
        view_of_copies_of_heads,
    )
}

INPUT = codes(3, K, seed=0)


def run(model, x):
    """Results of a call, and what it leaves in its buffers, weights and input."""
    x = x.clone()
    with torch.no_grad():
        results = model(x)
    results = results if isinstance(results, tuple) else (results,)
    return [r.clone() for r in results], [x, *(owner_state(model).values())]


def owner_state(model):
    return getattr(model, "module", model).state_dict()


def compiled(block, **options):
    call = compile_eager(block, **options)
    call.module = block
    return call


def distance(actual, expected):
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-6))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", WRITES)
def test_int8_sees_every_write(write, place):
    write, function = WRITES[write], PLACES[place]
    try:
        expected, left = run(Block(function, write), INPUT)
    except RuntimeError as error:
        if "view size is not compatible" in str(error):  # .view(-1) of a transpose
            pytest.skip("PyTorch has no such view")
        raise
    without, _ = run(Block(function, lambda t: None), INPUT)
    assert any(distance(a, b) > 0.1 for a, b in zip(without, expected, strict=True)), "the write changes nothing"
    actual, left_by_int8 = run(compiled(Block(function, write)), INPUT)
    for got, want in zip(actual, expected, strict=True):
        assert distance(got, want) < 0.03
    for got, want in zip(left_by_int8, left, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("place", PLACES)
def test_without_a_write_all_is_rewritten(place):
    """So that the table above is not about linears that stay in float."""
    expected, _ = run(Block(PLACES[place], lambda t: None), INPUT)
    actual, _ = run(compiled(Block(PLACES[place], lambda t: None)), INPUT)
    for got, want in zip(actual, expected, strict=True):
        assert distance(got, want) < 0.03
    report = last_report()
    assert report.rewritten == len(report.sites)
    if "head" in place:
        assert report.graphs[0].pass_counts["group_heads"] == 1


@pytest.mark.parametrize("view", [lambda w: w.view(-1)[:K], lambda w: w[2], lambda w: w.detach()[4]])
def test_an_input_that_comes_to_lie_in_a_weight_at_a_later_call(view, caplog):
    """Not when the graph was captured, so no pass saw it, and no guard does."""

    def function(m, x, cache):
        cache.mul_(-3)
        return F.linear(x, m.w1)

    block = Block(function, None)
    call = compile_eager(block)
    with torch.no_grad():
        for _ in range(2):
            assert distance(call(INPUT, torch.ones(K)), F.linear(INPUT, block.w1)) < 0.03
        assert last_report().summary() == "1 of 1 linears"
        for _ in range(2):
            expected = block.w1.clone()
            view(expected).mul_(-3)
            assert torch.equal(call(INPUT, view(block.w1)), F.linear(INPUT, expected))
            assert torch.equal(block.w1, expected)
        assert distance(call(INPUT, torch.ones(K)), F.linear(INPUT, block.w1)) < 0.03
    assert len(call.graphs) <= 2


@pytest.mark.parametrize("place", ["activation", "bias"])
def test_inputs_that_come_to_overlap_at_a_later_call(place):
    """What is read once for two products changes between them, which it did not when the graph was captured."""

    def function(m, x, written):
        first = F.linear(x, m.w1, m.b1)
        written.mul_(-3)
        return first, F.linear(x, m.w2, m.b2), x

    block = Block(function, None)
    call = compile_eager(block)
    with torch.no_grad():
        for overlapping in (False, True, False, True):
            x = INPUT.clone()
            written = (x.view(-1)[:N] if place == "activation" else block.b2.view(-1)) if overlapping else torch.ones(N)
            before = block.b2.clone()
            got = call(x, written)
            block.b2.copy_(before)
            if overlapping and place == "activation":
                x = INPUT.clone()
                written = x.view(-1)[:N]
            want = block(x, written)
            block.b2.copy_(before)
            assert all(distance(a, b) < 0.03 for a, b in zip(got, want, strict=True))


def test_inputs_that_come_to_overlap_others_than_at_first():
    """What is written shares memory with another input from the beginning, and later with the activation instead."""

    def function(m, x, written, c):
        first = F.linear(x, m.w1)
        written.mul_(-3)
        return first, F.linear(x, m.w2), c + 1

    block = Block(function, None)
    call = compile_eager(block)

    def inputs(place):
        x, c = INPUT.clone(), torch.ones(N)
        return x, {"x": x.view(-1)[:N], "c": c[:N], "none": torch.ones(N)}[place], c

    with torch.no_grad():
        for place in ("c", "x", "c", "x", "none"):
            want = block(*inputs(place))
            assert all(distance(a, b) < 0.03 for a, b in zip(call(*inputs(place)), want, strict=True)), place


def test_heads_that_come_to_overlap_what_is_written():
    """No linear is in the graph, and grouped heads are read after the write instead of before."""

    def attention(q, k, v, written):
        k, v = (t[:, :, None].expand(1, 2, 2, 5, 8).reshape(1, 4, 5, 8) for t in (k, v))
        written.mul_(-3)
        return F.scaled_dot_product_attention(q, k, v)

    def inputs(overlapping):
        q, k, v = (torch.randn(1, heads, 5, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 2))
        return q, k, v, k.view(-1)[:N] if overlapping else torch.ones(N)

    call = compile_eager(attention)
    with torch.no_grad():
        for overlapping in (False, True, False, True):
            torch.testing.assert_close(call(*inputs(overlapping)), attention(*inputs(overlapping)))
    assert last_report().graphs[-1].pass_counts["group_heads"] == 1


def test_what_lies_apart_in_one_storage_does_not_overlap(caplog):
    def function(m, x, written):
        first = F.linear(x, m.w1)
        written.mul_(-3)
        return first, F.linear(x, m.w2)

    block = Block(function, None)
    call = compile_eager(block)
    with torch.no_grad():
        call(INPUT.clone(), torch.ones(N))
        buffer = torch.cat([INPUT.flatten(), torch.ones(N)])
        x, written = buffer[: INPUT.numel()].view(INPUT.shape), buffer[INPUT.numel() :]
        in_int8 = call(x, written)
        assert not torch.equal(in_int8[0], F.linear(INPUT, block.w1))
    assert "run in float" not in caplog.text
