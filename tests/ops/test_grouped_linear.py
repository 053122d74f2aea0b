"""grouped_linear against separate linears of each expert's rows, and against LLM.int8() in float64.

Promised: the bits of the separate linears, with every provider and any number of threads; 0 for rows of no expert; and
for whatever the offsets hold, the meaning that ``expert_of_rows`` gives them, with nothing read or written elsewhere.
"""

import gold
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8compile.native import loader, providers
from int8compile.ops import grouped_input_gradient, grouped_linear, input_gradient, linear, quantize_weight
from int8compile.ops._library import REFERENCES
from int8compile.ops.grouped_linear import expert_of_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
native = pytest.mark.skipif(
    not providers.choose_provider("auto", [torch.ones(1)]).native, reason="no native kernels here"
)


def experts(count: int, n: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(count, n, k, generator=torch.Generator().manual_seed(seed))
    codes, scale = quantize_weight(weight.reshape(count * n, k))
    return codes.reshape(count, n, k), scale.reshape(count, n)


def activation(rows: int, k: int, dtype: torch.dtype = torch.float32, outliers: int = 0) -> torch.Tensor:
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows + k))
    for t in range(outliers if rows and k else 0):
        x[(5 * t) % rows, (7 * t) % k] = -9.0 - t
    return x.to(dtype)


def offsets(*sizes: int) -> torch.Tensor:
    return torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)


def separately(x, weight, scale, ends, bias, threshold, policy="column", operator=linear) -> torch.Tensor:
    """Each expert's rows by an operator of their own."""
    out = torch.zeros(x.shape[0], weight.shape[1], dtype=x.dtype)
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        offset = None if bias is None else bias[expert]
        if end > begin:
            out[begin:end] = operator(x[begin:end], weight[expert], scale[expert], offset, threshold, policy)
        begin = end
    return out


@st.composite
def problems(draw: st.DrawFn):
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 9, 17]), min_size=1, max_size=6))
    k, n = draw(st.sampled_from([1, 3, 16, 65, 130])), draw(st.sampled_from([1, 7, 16, 33, 100]))
    rows = sum(sizes) + draw(st.integers(0, 3))  # the last of which are no expert's
    x = activation(rows, k, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 6)))
    bias = torch.randn(len(sizes), n) if draw(st.booleans()) else None
    threshold, policy = draw(st.sampled_from([0.0, 6.0, 2.0])), draw(st.sampled_from(["column", "element", "all"]))
    return x, *experts(len(sizes), n, k), offsets(*sizes), bias, threshold, policy


@native
@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_the_bits_of_separate_linears_with_every_provider(problem):
    loader.load("cpu")
    try:
        for name in torch.ops.int8compile_native.isas().split():
            torch.ops.int8compile_native.set_isa(name)
            assert torch.equal(grouped_linear(*problem), separately(*problem)), name
    finally:
        torch.ops.int8compile_native.set_isa("auto")


@given(problem=problems(), body=st.sampled_from([grouped_linear, REFERENCES[grouped_linear]]))
@settings(max_examples=60, deadline=None)
def test_llm_int8_in_float64(problem, body):
    x, *_ = problem
    want = separately(*problem, operator=lambda *args: gold.linear(*args).to(x.dtype))
    # A value at a tie may take the neighbouring code in fp32: allow one code's worth in one row.
    slack = BOUND[x.dtype] * float(want.float().norm()) + 2e-3 * float(want.abs().max() if want.numel() else 0)
    assert float((body(*problem).double() - want.double()).norm()) <= slack


@native
@given(ends=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 12), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_any_offsets_mean_the_same_and_stay_inside(ends):
    x, (weight, scale), given_ends = activation(9, 33), experts(4, 20, 33), torch.tensor(ends, dtype=torch.int32)
    out = grouped_linear(x, weight, scale, given_ends, None, 0.0)
    assert torch.equal(out, REFERENCES[grouped_linear](x, weight, scale, given_ends, None, 0.0))
    rows_of_none = expert_of_rows(given_ends, 9) == 4
    assert out[rows_of_none].eq(0).all()
    grad = torch.randn(9, 20)
    args = (grad, weight, scale, given_ends, torch.float32)
    torch.testing.assert_close(grouped_input_gradient(*args), REFERENCES[grouped_input_gradient](*args))


@native
def test_threads_and_shares_change_no_bit():
    x, (weight, scale) = activation(70, 200, torch.bfloat16, outliers=9), experts(6, 300, 200)
    args = (x, weight, scale, offsets(1, 0, 40, 3, 0, 20), None, 6.0)
    before = torch.get_num_threads()
    try:
        outs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(grouped_linear(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_an_outlier_concerns_its_own_expert_alone():
    x, (weight, scale), ends = activation(8, 32), experts(2, 16, 32), offsets(4, 4)
    before = grouped_linear(x, weight, scale, ends, None, 6.0)
    x[1, 3] = 50.0
    after = grouped_linear(x, weight, scale, ends, None, 6.0)
    assert torch.equal(before[4:], after[4:])
    assert not torch.equal(before[:4], after[:4])


@pytest.mark.parametrize("layout", ["columns of a wider one", "expanded", "transposed", "every second expert"])
def test_weights_in_any_layout(layout):
    x, (weight, scale), ends = activation(6, 24), experts(3, 24, 24), offsets(2, 0, 4)
    laid = {
        "columns of a wider one": torch.cat([weight, weight], dim=2)[:, :, 24:],
        "expanded": weight[:1].expand(3, 24, 24),
        "transposed": weight.mT.contiguous().mT,
        "every second expert": weight.repeat_interleave(2, dim=0)[::2],
    }[layout]
    want = grouped_linear(x, laid.clone(memory_format=torch.contiguous_format), scale, ends, None, 0.0)
    assert torch.equal(grouped_linear(x, laid, scale.t().contiguous().t(), ends.repeat(2)[:3], None, 0.0), want)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_to_do(rows):
    weight, scale = experts(3, 16, 8)
    out = grouped_linear(torch.randn(rows, 8), weight, scale, offsets(0, 0, 0), None, 6.0)
    assert out.shape == (rows, 16)
    assert out.eq(0).all()
    none = grouped_linear(torch.randn(rows, 8), weight[:0], scale[:0], offsets(), None, 6.0)
    assert none.eq(0).all()


class TestGradients:
    def test_are_those_of_separate_linears(self):
        (weight, scale), ends = experts(4, 20, 33), offsets(3, 0, 5, 1)
        x, bias = activation(11, 33, outliers=2).requires_grad_(), torch.randn(4, 20, requires_grad=True)
        grad = torch.randn(11, 20)
        grouped_linear(x, weight, scale, ends, bias, 6.0).backward(grad)
        begin = 0
        for expert, end in enumerate(ends.tolist()):
            want = input_gradient(grad[begin:end], weight[expert], scale[expert], torch.float32)
            torch.testing.assert_close(x.grad[begin:end], want)
            torch.testing.assert_close(bias.grad[expert], grad[begin:end].sum(0))
            begin = end
        assert x.grad[begin:].eq(0).all()

    def test_only_what_is_asked_for(self):
        (weight, scale), ends = experts(2, 8, 8), offsets(1, 2)
        bias = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
        grouped_linear(torch.randn(3, 8), weight, scale, ends, bias, 0.0).sum().backward()
        assert bias.grad.dtype == torch.bfloat16
        torch.testing.assert_close(bias.grad.float(), torch.tensor([[1.0], [2.0]]).expand(2, 8))

    def test_of_gradients(self):
        (weight, scale), ends = experts(2, 8, 5), offsets(1, 2)
        grad = torch.randn(4, 8, requires_grad=True)
        upstream = torch.randn(4, 5)
        grouped_input_gradient(grad, weight, scale, ends, torch.float32).backward(upstream)
        dequantized = weight.float() * scale.unsqueeze(2)
        want = torch.cat([upstream[:1] @ dequantized[0].t(), upstream[1:3] @ dequantized[1].t(), torch.zeros(1, 8)])
        torch.testing.assert_close(grad.grad, want)


@pytest.mark.parametrize("policy", ["column", "element", "all"])
def test_opcheck(policy):
    (weight, scale), ends = experts(3, 12, 16), offsets(2, 0, 3)
    x, bias = activation(6, 16, outliers=1).requires_grad_(), torch.randn(3, 12)
    torch.library.opcheck(grouped_linear, (x, weight, scale, ends, bias, 6.0, policy))
    torch.library.opcheck(grouped_input_gradient, (torch.randn(6, 12), weight, scale, ends, torch.float32))


@pytest.mark.parametrize("body", [grouped_linear, REFERENCES[grouped_linear]])
def test_bad_arguments_are_named(body):
    (weight, scale), ends, x = experts(2, 8, 4), offsets(1, 1), torch.randn(2, 4)
    bad = [
        ((x[0], weight, scale, ends, None, 0.0), r"x is \[4\]; expected \[S, K\]"),
        ((x, weight[0], scale, ends, None, 0.0), r"weight is .* \[8, 4\].*; expected int8 \[E, N, K\]"),
        ((x, weight.float(), scale, ends, None, 0.0), "weight is .*loat.*; expected int8"),
        ((x, weight[:, :, :3], scale, ends, None, 0.0), r".*takes 3 features, but x has 4"),
        ((x, weight, scale[0], ends, None, 0.0), "weight_scale is"),
        ((x, weight, scale, ends.long(), None, 0.0), "offsets is .*, where each expert's rows end"),
        ((x, weight, scale, ends[:1], None, 0.0), "offsets is"),
        ((x, weight, scale, ends, torch.randn(8), 0.0), r"bias is not \[2, 8\]"),
        ((x, weight, scale, ends, None, -1.0), "threshold=-1"),
        ((x, weight, scale, ends, None, 0.0, "row"), "outlier_policy='row'; expected"),
        ((x.double(), weight, scale, ends, None, 0.0), "x has dtype"),
    ]
    for args, message in bad:
        with pytest.raises(ValueError, match=f"int8compile::grouped_linear: {message}"):
            body(*args)
