"""The outlier policies without detection: "none", and "calibrated", whose columns are given.

Both are sums of integers: a row comes out the same, to the bit, in any batch, with any number of threads and any
provider, the reference included. What they compute is held against float64.
"""

import itertools
from typing import Any

import gold
import pytest
import torch
from every_provider import assert_same_bits, each_provider
from hypothesis import given, settings
from hypothesis import strategies as st

from int8compile.ops import grouped_linear, linear, master_linear
from int8compile.ops._library import REFERENCES
from int8compile.ops.linear import calibrated_codes

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EXTREMES = (0.0, 1e-45, -1e-40, 2.0**-121, 2.0**-119, 65504.0, -3e38, float("inf"), -float("inf"), float("nan"))
sizes = st.one_of(st.integers(0, 4), st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 97, 130, 200]))


class Problem:
    """x [M, K] with large values in some columns, an int8 weight, and the columns in ascending order."""

    def __init__(self, m: int, n: int, k: int, c: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.columns = torch.randperm(k, generator=generator)[:c].sort().values.to(torch.int32)
        self.x = torch.randn(m, k, generator=generator)
        self.x[:, self.columns.long()] *= 40
        self.x = self.x.to(dtype)
        self.weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
        self.scale = torch.rand(n, generator=generator) * 0.01
        self.bias = torch.randn(n, generator=generator)

    def args(self, policy: str = "calibrated", threshold: float = 6.0) -> tuple[Any, ...]:
        first = (self.x, self.weight, self.scale, self.bias, threshold, policy)
        if policy != "calibrated":
            return first
        return (*first, self.columns, self.weight[:, self.columns.long()].contiguous())


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    k = draw(sizes)
    c = draw(st.integers(0, min(k, 40)))
    made = Problem(draw(sizes), draw(sizes), k, c, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99)))
    values = made.x.view(-1)
    for at in draw(st.lists(st.integers(0, max(len(values), 1) - 1), max_size=4)) if len(values) else ():
        values[at] = draw(st.sampled_from(EXTREMES))
    return made


@given(problem=problems(), policy=st.sampled_from(["none", "calibrated"]))
@settings(max_examples=120, deadline=None)
def test_a_row_has_the_same_bits_in_any_batch_with_any_provider(problem, policy):
    want = REFERENCES[linear](*problem.args(policy))
    assert_same_bits(REFERENCES[linear](*problem.args(policy)[:7]), want)
    for _ in each_provider():
        got = linear(*problem.args(policy))
        assert_same_bits(got, want)
        assert_same_bits(linear(*problem.args(policy)[:7]), want)  # without a copy of the weight in the columns
        alone = [linear(row, *problem.args(policy)[1:]) for row in problem.x.split(1)]
        assert_same_bits(torch.cat(alone) if alone else got, want)


@pytest.mark.parametrize("policy", ["none", "calibrated"])
def test_nor_does_it_depend_on_threads(policy):
    problem = Problem(70, 200, 576, 12, torch.bfloat16)
    want, before = REFERENCES[linear](*problem.args(policy)), torch.get_num_threads()
    try:
        for _, threads in itertools.product(each_provider(), (1, 2, 3)):
            torch.set_num_threads(threads)
            assert_same_bits(linear(*problem.args(policy)), want)
            assert_same_bits(linear(*problem.args(policy)[:7]), want)
            assert_same_bits(linear(problem.x[13:50], *problem.args(policy)[1:]), want[13:50])
    finally:
        torch.set_num_threads(before)


@given(problem=problems())
@settings(max_examples=120, deadline=None)
def test_codes_are_within_half_a_step_and_have_16_bits_in_the_columns_alone(problem):
    codes, high, row_scale = calibrated_codes(problem.x, problem.columns)
    at, x = problem.columns.long(), problem.x.double()
    whole = codes.double()
    whole[:, at] += 128 * high.double()
    usual = row_scale.isfinite() & (row_scale > 0)
    steps = (x / row_scale[:, None].double())[usual] - whole[usual]
    assert (steps.abs() <= 0.5 + 2e-3).all()  # of 16256 codes, in fp32
    assert codes.abs().max().item() <= 127 if codes.numel() else True
    # Nothing in the columns widens the step, until it is 128 times as large as anything else.
    rest = x.index_fill(1, at, 0.0).abs().amax(1) if x.shape[1] else x.new_zeros(len(x))
    inside = x[:, at].abs().amax(1) if len(at) else torch.zeros_like(rest)
    expected = torch.maximum(rest, inside / 128)[usual] / 127
    torch.testing.assert_close(row_scale.double()[usual], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calibrated_is_close_to_float_where_outliers_are_in_its_columns(dtype):
    problem = Problem(33, 64, 300, 9, dtype, seed=3)
    float_product = gold.linear(problem.x, problem.weight, problem.scale, problem.bias, 0.0, "all")
    errors = {p: gold.relative_error(linear(*problem.args(p)), float_product) for p in ("calibrated", "none")}
    assert errors["calibrated"] < 0.004 < 0.01 < errors["none"]


def test_none_is_a_threshold_of_0_whatever_the_threshold():
    problem = Problem(5, 40, 70, 3)
    off = linear(*problem.args("column", 0.0))
    assert_same_bits(linear(*problem.args("none", 6.0)), off)
    weight = torch.randn(40, 70)
    assert_same_bits(master_linear(problem.x, weight, None, 6.0, "none"), master_linear(problem.x, weight, None, 0.0))
    experts = (problem.x, problem.weight[None], problem.scale[None], torch.tensor([5], dtype=torch.int32), None)
    for each in (grouped_linear, REFERENCES[grouped_linear]):
        assert_same_bits(each(*experts, 6.0, "none"), each(*experts, 0.0, "column"))


def test_no_columns_are_none():
    problem = Problem(5, 40, 70, 0)
    assert_same_bits(linear(*problem.args("calibrated")), linear(*problem.args("none")))


def test_leading_dimensions_and_layouts():
    problem = Problem(6, 40, 70, 4)
    x, *rest = problem.args()
    want = linear(x, *rest)
    assert_same_bits(linear(x.view(2, 3, 70), *rest), want.view(2, 3, 40))
    assert_same_bits(linear(x[0], *rest), want[0])
    for i in (0, 6):
        rest[i] = rest[i].t().contiguous().t()
    rest[5] = rest[5].repeat_interleave(2)[::2]
    assert_same_bits(linear(x.t().contiguous().t(), *rest), want)


def test_gradients_reach_the_activation_and_the_bias():
    problem = Problem(6, 40, 70, 4)
    x, bias = problem.x.clone().requires_grad_(), problem.bias.clone().requires_grad_()
    _, weight, scale, _, *rest = problem.args()
    linear(x, weight, scale, bias, *rest).backward(torch.ones(6, 40))
    want = torch.ones(6, 40) @ (weight.float() * scale[:, None])
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(bias.grad, torch.full((40,), 6.0))


@pytest.mark.parametrize("policy", ["none", "calibrated"])
def test_opcheck(policy):
    problem = Problem(4, 24, 40, 3)
    torch.library.opcheck(linear, problem.args(policy))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"columns": None, "column_weight": None}, "with columns absent and column_weight absent; expected columns"),
        ({"columns": None}, "with columns absent and column_weight given; expected columns"),
        ({"policy": "column"}, "outlier_policy='column' with columns given"),
        ({"columns": torch.tensor([1, 2, 3])}, "columns is .*expected int32"),
        ({"column_weight": torch.zeros(24, 4, dtype=torch.int8)}, "column_weight is .*, 4.*expected"),
    ],
)
def test_arguments_that_do_not_fit(change, problem):
    first, columns, column_weight = Problem(4, 24, 40, 3).args()[:5], *Problem(4, 24, 40, 3).args()[6:]
    given = {"policy": "calibrated", "columns": columns, "column_weight": column_weight, **change}
    for each in (linear, REFERENCES[linear]):
        with pytest.raises(ValueError, match=problem):
            each(*first, given["policy"], given["columns"], given["column_weight"])


@pytest.mark.parametrize("columns", [[1, 1, 2], [3, 2, 1], [1, 2, 40], [-1, 2, 3]])
def test_columns_are_features_in_ascending_order(columns):
    args = list(Problem(4, 24, 40, 3).args())
    args[6] = torch.tensor(columns, dtype=torch.int32)
    for _ in each_provider():
        with pytest.raises(ValueError, match=r"columns\[\d\]=-?\d+; expected features below 40, in ascending order"):
            linear(*args)


def test_other_operators_know_no_columns():
    problem = Problem(4, 24, 40, 3)
    with pytest.raises(ValueError, match="outlier_policy='calibrated'; expected one of"):
        master_linear(problem.x, torch.randn(24, 40), None, 6.0, "calibrated")
