"""Weights that are rows of a parameter: the same numbers as with parameters of their own."""

import pytest
import torch
from compiling import compile_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from int8compile import dump, last_report

N, K = 24, 16
X = torch.randn(5, K, generator=torch.Generator().manual_seed(0)) * 3
WEIGHT = torch.randn(N, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _inference():
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Sliced(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.weight = nn.Parameter(WEIGHT.clone())
        self.part = part

    def forward(self, x):
        return functional.linear(x, self.part(self.weight))


def compiled(part, **options):
    torch._dynamo.reset()
    out = compile_eager(Sliced(part), **options)(X)
    return out, last_report().sites[0].reason.name


def own(rows):
    """The same rows as a parameter of their own."""
    return compiled(lambda w: w, skip_output_embeddings=False)[0][:, rows]


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(0, N - 1), st.integers(1, N)).filter(lambda ends: ends[0] < ends[1]))
def test_rows_are_those_of_the_whole(ends):
    rows = slice(*ends)
    out, reason = compiled(lambda w: w[rows])
    assert reason == "REWRITTEN" or ends == (0, N)
    assert torch.equal(out, own(rows))


@pytest.mark.parametrize(
    ("part", "rows"),
    [
        (lambda w: w.split([8, 16])[1], slice(8, 24)),
        (lambda w: w.chunk(3)[2], slice(16, 24)),
        (lambda w: w.narrow(0, 3, 5), slice(3, 8)),
        (lambda w: w[4:][2:9], slice(6, 13)),
        (lambda w: w.view(3, 8, K)[1], slice(8, 16)),
        (lambda w: w.detach()[2:], slice(2, N)),
    ],
)
def test_however_the_view_is_made(part, rows):
    out, reason = compiled(part)
    assert reason == "REWRITTEN"
    assert torch.equal(out, own(rows))


@pytest.mark.parametrize(
    "part",
    [
        lambda w: w[::2],
        lambda w: w[torch.tensor([3, 1])],
        lambda w: w[4:8] * 1,
        lambda w: w.view(2 * N, K // 2)[:, :].reshape(N, K)[4:8].flip(0),
        lambda w: w.flatten()[4 : 4 + 2 * K].view(2, K),  # begins in the middle of a row
        lambda w: torch._neg_view(w)[4:8],
    ],
)
def test_what_is_not_whole_rows_stays_in_float(part):
    out, reason = compiled(part)
    assert reason == "NOT_CONSTANT"
    assert torch.equal(out, functional.linear(X, part(WEIGHT)))


def test_a_written_parameter_stays_in_float():
    def part(w):
        w.mul_(1)
        return w[4:8]

    assert compiled(part)[1] == "MUTATED"


def test_one_int8_weight_serves_all_its_slices_and_the_float_one_is_gone():
    class Split(Sliced):
        def forward(self, x):
            q, kv = self.weight.split([8, 16])
            return functional.linear(x, q), functional.linear(x + 1, kv)

    model = Split(None)
    call = compile_eager(model)
    first = [y.clone() for y in call(X)]
    text = dump(call.graphs[0])
    assert text.count('int8 "weight"') == 1
    assert 'weight "weight"' not in text.replace('int8 "weight"', "")
    assert "split" not in text
    model.weight.mul_(2)  # seen at the next call
    for before, after in zip(first, call(X), strict=True):
        torch.testing.assert_close(after, 2 * before)
