"""The operators on random problems of every kind, with every provider this CPU has: hypothesis looks for the odd one.

Sizes down to 0 and 1, thresholds to the ends of float32, NaN, infinities and subnormal numbers, every dtype, and each
tensor argument in a layout of its own, expanded ones with strides of 0 included. What is promised:

* ``quantize_rowwise`` has the reference's bits, whichever the provider;
* so have ``linear`` and ``scaled_mm`` where no outlier product takes part; where one does, its sum is taken in another
  order, and fp32 roundings of its terms are what may differ;
* under policy "all" every term may be rounded so, and a row comes out the same alone as among others;
* the reference is LLM.int8() in float64 (``gold.py``) up to fp32's roundings and that of the output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import gold
import pytest
import torch
from every_provider import assert_same_bits, each_provider
from hypothesis import given, settings
from hypothesis import strategies as st

from int8compile.limits import SMALLEST_THRESHOLD
from int8compile.native import providers
from int8compile.ops import input_gradient, linear, master_linear, quantize_rowwise, quantize_weight, scaled_mm
from int8compile.ops._library import REFERENCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
THRESHOLDS = (0.0, SMALLEST_THRESHOLD, 1e-30, 0.5, 2.5, 6.0, 1e30, torch.finfo(torch.float32).max, float("inf"))
EXTREMES = (
    *(0.0, -0.0, 1e-45, -1e-40, 1e-7, 2.0**-126, 2.0**-121, 2.0**-119, -6.0, 65504.0, -3e38),
    *(float("inf"), -float("inf"), float("nan")),
)
#: name -> these values in that layout; an expanded one has its first row, column or element everywhere
MATRICES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "row-major": lambda t: t.contiguous(),
    "transposed": lambda t: t.t().contiguous().t(),
    "columns of a wider one": lambda t: torch.cat([t, t, t], dim=1)[:, t.shape[1] : 2 * t.shape[1]],
    "every second column": lambda t: t.repeat_interleave(2, dim=1)[:, ::2],
    "every second row": lambda t: t.repeat_interleave(2, dim=0)[::2],
    "an odd offset": lambda t: torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape),
    "expanded rows": lambda t: t[:1].expand(t.shape) if len(t) else t,
    "expanded columns": lambda t: t[:, :1].expand(t.shape) if t.shape[1] else t,
}
VECTORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dense": lambda t: t,
    "every third": lambda t: t.repeat_interleave(3)[::3],
    "an odd offset": lambda t: torch.cat([t[:0].new_zeros(1), t])[1:],
    "expanded": lambda t: t[:1].expand(t.shape) if len(t) else t,
}
sizes = st.one_of(st.integers(0, 4), st.sampled_from([7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 97, 130, 200]))


class Problem(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    threshold: float
    policy: str

    @property
    def residual_from(self) -> float:
        return self.threshold if self.policy == "element" else 0.0

    def arguments(self) -> tuple[Any, ...]:
        return self.x, self.weight, self.scale, self.bias, self.threshold, self.policy


@st.composite
def activations(draw: st.DrawFn, k: int | None = None) -> torch.Tensor:
    dtype, m, k = draw(st.sampled_from(DTYPES)), draw(sizes), draw(sizes) if k is None else k
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    x = x * draw(st.sampled_from([1.0, 1.0, 5.0, 1e-38, 1e4, 1e33]))
    for at in draw(st.lists(st.integers(0, max(m * k, 1) - 1), max_size=6)) if m * k else ():
        x.view(-1)[at] = draw(st.sampled_from(EXTREMES))
    return MATRICES[draw(st.sampled_from(sorted(MATRICES)))](x.to(dtype))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n, k = draw(sizes), draw(sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=generator)
    scale = torch.rand(n, generator=generator) * draw(st.sampled_from([0.01, 0.01, 1e-39, 0.0]))
    x = draw(activations(k))
    bias = torch.randn(n, generator=generator).to(draw(st.sampled_from([x.dtype, torch.float32, torch.float64])))
    return Problem(
        x,
        MATRICES[draw(st.sampled_from(sorted(MATRICES)))](weight),
        VECTORS[draw(st.sampled_from(sorted(VECTORS)))](scale),
        draw(st.sampled_from([None, VECTORS[draw(st.sampled_from(sorted(VECTORS)))](bias)])),
        draw(st.sampled_from(THRESHOLDS)),
        draw(st.sampled_from(["column", "element"])),
    )


def fp32_rounding(terms: int) -> float:
    """Of a sum of so many terms, added in any order, and of what is done to it afterwards."""
    return 2e-6 + terms * 2.0**-23


class Terms(NamedTuple):
    """What the magnitudes of a product's terms add up to, in float64: of the finite ones, and of all before and after
    scaling."""

    finite_reach: torch.Tensor
    reach: torch.Tensor
    scaled_reach: torch.Tensor
    rounding: float  # of a sum in fp32, in any order, relative to that

    @classmethod
    def of(
        cls, q: torch.Tensor, row_scale: torch.Tensor, mask: torch.Tensor | None, problem: Problem, least: float
    ) -> "Terms":
        x, weight, scale = problem.x.double(), problem.weight.double(), problem.scale.double()
        covered = row_scale.double()[:, None] * q.double()
        carries = torch.zeros_like(x, dtype=torch.bool) if mask is None else mask & (x.abs() >= least)
        residual = torch.where(carries, x - covered, 0.0)
        integers = row_scale.double()[:, None] * (q.double() @ weight.t())
        bias = torch.zeros(()) if problem.bias is None else problem.bias.double()
        reach = integers.abs() + residual.abs() @ weight.abs().t()
        some = [torch.where(t.isfinite(), t.abs(), 0.0) for t in (integers, residual)]
        rounding = fp32_rounding(x.shape[1])
        return cls(some[0] + some[1] @ weight.abs().t(), reach, reach * scale + bias.abs(), rounding)

    def within(self, dtype: torch.dtype) -> torch.Tensor:
        """Where no sum of terms leaves float32, nor their result `dtype`. (Of sums that do, some orders do not.)"""
        inside = self.scaled_reach < 0.98 * torch.finfo(dtype).max
        return (self.finite_reach < 1e37) & (inside | ~self.reach.isfinite())


def assert_close(got: torch.Tensor, want: torch.Tensor, terms: Terms) -> None:
    """Equal up to the order of fp32 sums."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    info, fits = torch.finfo(got.dtype), terms.within(got.dtype)
    assert torch.equal(got.isnan()[fits], want.isnan()[fits])
    assert torch.equal(got.isinf()[fits], want.isinf()[fits])
    bound = (
        want.double().abs() * info.eps * 1.01
        + terms.scaled_reach * terms.rounding
        + info.smallest_normal * info.eps * 1.01
    )
    assert not ((got.double() - want.double()).abs() > bound)[fits & want.isfinite()].any()


@given(x=activations(), threshold=st.sampled_from(THRESHOLDS))
@settings(max_examples=150, deadline=None)
def test_quantize_rowwise_has_the_references_bits(x, threshold):
    want = REFERENCES[quantize_rowwise](x, threshold)
    for _ in each_provider():
        for a, b in zip(quantize_rowwise(x, threshold), want, strict=True):
            assert_same_bits(a, b)


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_linear_is_the_reference(problem):
    q, row_scale, columns = REFERENCES[quantize_rowwise](problem.x, problem.threshold)
    mask = columns if problem.threshold > 0 else None
    want = REFERENCES[linear](*problem.arguments())
    terms = Terms.of(q, row_scale, mask, problem, problem.residual_from)
    for _ in each_provider():
        got = linear(*problem.arguments())
        assert_close(got, want, terms)
        if not columns.any():
            assert_same_bits(got, want)


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_linear_with_weights_only_is_the_reference(problem):
    arguments = (*problem.arguments()[:5], "all")
    want = REFERENCES[linear](*arguments)
    nothing = torch.zeros(problem.x.shape, dtype=torch.int8), torch.zeros(len(problem.x))
    terms = Terms.of(*nothing, torch.ones(problem.x.shape[1], dtype=torch.bool), problem, 0.0)
    for _ in each_provider():
        got = linear(*arguments)
        assert_close(got, want, terms)
        alone = [linear(row, *arguments[1:]) for row in problem.x.split(1)]
        assert_same_bits(torch.cat(alone) if alone else got, got)


@given(
    problem=problems(),
    layouts=st.tuples(st.sampled_from(sorted(MATRICES)), *[st.sampled_from(sorted(VECTORS))] * 2),
    flags=st.sampled_from(["none", "no column", "some", "all"]),
    row_scale=st.sampled_from([0.0, 1e-39, 0.01, 1e30, float("inf"), float("nan")]),
    out_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_scaled_mm_is_the_reference_for_any_codes_and_columns(problem, layouts, flags, row_scale, out_dtype, seed):
    """Whatever ``quantize_rowwise`` would have made of x: codes down to -128, scales and columns out of the blue."""
    generator = torch.Generator().manual_seed(seed)
    m, k = problem.x.shape
    q = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=generator)
    scales = torch.where(torch.rand(m, generator=generator) < 0.3, row_scale, torch.rand(m, generator=generator))
    mask = torch.rand(k, generator=generator) < {"some": 0.3, "all": 1.0}.get(flags, 0.0)
    q, scales = MATRICES[layouts[0]](q), VECTORS[layouts[1]](scales)
    outliers = None if flags == "none" else VECTORS[layouts[2]](mask)
    rest = (problem.weight, problem.scale, problem.bias, out_dtype, problem.residual_from)
    want = REFERENCES[scaled_mm](q, scales, problem.x, outliers, *rest)
    terms = Terms.of(q, scales, outliers, problem, problem.residual_from)
    for _ in each_provider():
        got = scaled_mm(q, scales, problem.x, outliers, *rest)
        assert_close(got, want, terms)
        if outliers is None or not outliers.any():
            assert_same_bits(got, want)


def other_codes(q: torch.Tensor, row_scale: torch.Tensor, problem: Problem) -> torch.Tensor:
    """1 where the reference has another code than the gold: the next one, for a value that in fp32 is at a tie."""
    codes, scale, _ = gold.row_codes(problem.x, problem.threshold)
    exact = problem.x.double() / scale[:, None]
    coded = (row_scale > 0) & row_scale.isfinite()
    differs = coded[:, None] & (q.double() != codes)
    assert ((q.double() - codes).abs()[differs] == 1).all()
    assert ((exact.abs() % 1 - 0.5).abs()[differs] < 1e-4).all()
    return differs.double()


@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_the_reference_is_the_gold(problem):
    got = REFERENCES[linear](*problem.arguments()).double()
    want = gold.linear(*problem.arguments())
    q, row_scale, columns = REFERENCES[quantize_rowwise](problem.x, problem.threshold)
    assert got.shape == want.shape
    mask = columns if problem.threshold > 0 else None
    terms = Terms.of(q, row_scale, mask, problem, problem.residual_from)
    info = torch.finfo(problem.x.dtype)
    finite = problem.x.isfinite().all(dim=1, keepdim=True).expand(want.shape)
    fits = finite & terms.within(problem.x.dtype)
    # What codes cover that fp32 rounded the other way, what any code does in fp32, and rows too small to have codes.
    weight, scale = problem.weight.double().abs(), problem.scale.double()
    covered = row_scale.double()[:, None] * (other_codes(q, row_scale, problem) + terms.rounding * q.double().abs())
    apart = (covered @ weight.t() + 127 * problem.x.shape[1] * 2.0**-120) * scale
    roundings = info.eps * want.abs() + (info.eps + terms.rounding) * terms.scaled_reach
    bound = roundings + apart + info.smallest_normal * info.eps
    assert not ((got - want).abs() > bound)[fits].any()
    broken = ~problem.x.isfinite().all(dim=1)
    if problem.x.shape[1] and bool((problem.weight != 0).all()) and bool((problem.scale > 0).all()):
        assert not got[broken].isfinite().any()


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_master_linear_and_gradients_do_not_depend_on_layouts(problem):
    """They are torch's own products around our operators: what they make of a layout is what they make of a copy."""
    x, weight = problem.x, problem.weight.to(torch.bfloat16)
    weight = MATRICES["every second column"](weight) if len(weight) % 2 else weight
    dense = [
        t if t is None else t.contiguous().clone() for t in (x, weight, problem.bias, problem.weight, problem.scale)
    ]
    for _ in each_provider():
        got = master_linear(x, weight, problem.bias, problem.threshold, problem.policy)
        want = master_linear(dense[0], dense[1], dense[2], problem.threshold, problem.policy)
        size = x.double().abs() @ weight.double().abs().t()
        bound = want.double().abs() * torch.finfo(x.dtype).eps + size * fp32_rounding(x.shape[1]) + 1e-6
        assert not ((got.double() - want.double()).abs() > bound)[size < 1e37].any()
        grad = got.new_ones(got.shape)
        for run in (input_gradient, REFERENCES[input_gradient]):
            args = (problem.weight, problem.scale, torch.float32), (dense[3], dense[4], torch.float32)
            torch.testing.assert_close(run(grad, *args[0]), run(grad, *args[1]), rtol=1e-4, atol=1e-4)


@given(x=activations())
@settings(max_examples=100, deadline=None)
def test_quantize_weight_does_not_depend_on_layouts(x):
    for a, b in zip(quantize_weight(x), quantize_weight(x.contiguous().clone()), strict=True):
        assert_same_bits(a, b)


def test_every_provider_is_tried():
    assert list(each_provider()) == torch.ops.int8compile_native.isas().split()
    assert torch.ops.int8compile_native.isa() == torch.ops.int8compile_native.isas().split()[0]
    assert {"portable"} <= set(each_provider())


@pytest.fixture(autouse=True)
def _native_kernels() -> None:
    if not providers.choose_provider("auto", [torch.ones(1)]).native:
        pytest.skip("no native kernels here")
