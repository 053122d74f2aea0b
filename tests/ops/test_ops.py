"""The operators against the float64 gold, over dtypes, shapes and every edge case of LLM.int8()."""

import itertools
from collections.abc import Iterator

import gold
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8compile.limits import MAX_IN_FEATURES
from int8compile.native import providers
from int8compile.ops import linear, quantize_rowwise, quantize_weight, scaled_mm
from int8compile.ops._library import REFERENCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One rounding to the output's dtype, and the rounding of residuals to the input's.
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(params=["native", "reference"], scope="class")
def _each_provider(request: pytest.FixtureRequest) -> Iterator[None]:
    """The class's tests with the native kernels (where they build), and with the reference bodies."""
    provider = providers.choose_provider("auto", [torch.ones(1)])
    if request.param == "native" and not provider.native:
        pytest.skip("no native kernels here")
    ours = {op: globals()[op] for op in ("linear", "quantize_rowwise", "scaled_mm")}
    if request.param == "reference":
        globals().update({name: REFERENCES[op] for name, op in ours.items()})
    yield
    globals().update(ours)


def activation(m: int, k: int, dtype: torch.dtype = torch.float32, outliers: int = 0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    for t in range(min(outliers, k)):
        x[t % max(m, 1) if m else 0 :, (7 * t) % k] = 8.0 + t
    return x.to(dtype)


def int8_weight(n: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_weight(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))


class TestQuantizeWeight:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_codes_are_the_gold(self, dtype):
        weight = torch.randn(33, 70).to(dtype)
        codes, scale = quantize_weight(weight)
        want, want_scale = gold.weight_codes(weight)
        assert codes.dtype == torch.int8
        assert scale.dtype == torch.float32
        # fp32 against float64: a value within an ulp of a tie may round the other way.
        assert (codes.double() != want).double().mean() < 1e-3
        torch.testing.assert_close(scale.double(), want_scale, rtol=1e-6, atol=0.0)

    @pytest.mark.parametrize("magnitude", [1e-9, 1e-30, 1e6, 1e30])
    def test_small_and_large_fp32_weights_keep_their_scale(self, magnitude):
        weight = torch.randn(8, 16) * magnitude
        codes, scale = quantize_weight(weight)
        back = codes.double() * scale.double().unsqueeze(1)
        assert ((back - weight.double()).abs() <= 0.51 * scale.double().unsqueeze(1)).all()
        assert codes.abs().amax(dim=1).eq(127).all()

    def test_zero_and_vanishing_channels_are_zero(self):
        weight = torch.stack([torch.zeros(5), torch.full((5,), 1e-38), torch.ones(5)])
        codes, scale = quantize_weight(weight)
        assert codes[:2].eq(0).all()
        assert scale[:2].eq(0).all()
        assert codes[2].eq(127).all()

    def test_ties_go_to_even(self):
        weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
        assert quantize_weight(weight)[0].tolist() == [[127, 0, 2, 2, 0, -2]]

    def test_bad_weights_are_named(self):
        with pytest.raises(ValueError, match=r"quantize_weight: weight has shape \[3\]; expected \[N, K\]"):
            quantize_weight(torch.ones(3))
        with pytest.raises(ValueError, match=r"dtype torch\.float64; expected float32"):
            quantize_weight(torch.ones(3, 3, dtype=torch.float64))


@pytest.mark.usefixtures("_each_provider")
class TestQuantizeRowwise:
    @pytest.mark.parametrize(("dtype", "threshold"), list(itertools.product(DTYPES, (0.0, 6.0, 2.5))))
    def test_codes_are_the_gold(self, dtype, threshold):
        x = activation(9, 50, dtype, outliers=3)
        codes, scale, columns = quantize_rowwise(x, threshold)
        want, want_scale, want_columns = gold.row_codes(x, threshold)
        assert (codes.double() != want).double().mean() < 3e-3
        torch.testing.assert_close(scale.double(), want_scale, rtol=1e-6, atol=0.0)
        assert torch.equal(columns, want_columns)

    def test_absmax_leaves_out_outlier_elements_but_not_their_columns(self):
        x = torch.tensor([[5.0, 1.0], [9.0, 2.0]])
        codes, scale, columns = quantize_rowwise(x, 6.0)
        assert columns.tolist() == [True, False]
        assert codes.tolist() == [[127, 25], [0, 127]]
        torch.testing.assert_close(scale, torch.tensor([5.0, 2.0]) / 127)

    def test_the_threshold_itself_is_an_outlier(self):
        assert quantize_rowwise(torch.tensor([[6.0, 5.999]]), 6.0)[2].tolist() == [True, False]

    def test_leading_dimensions_are_flattened(self):
        codes, scale, columns = quantize_rowwise(torch.randn(2, 3, 4, 8), 6.0)
        assert codes.shape == (24, 8)
        assert scale.shape == (24,)
        assert columns.shape == (8,)


@pytest.mark.usefixtures("_each_provider")
class TestLinear:
    @pytest.mark.parametrize(
        ("dtype", "threshold", "policy"), list(itertools.product(DTYPES, (0.0, 6.0, 1.5), ("column", "element", "all")))
    )
    def test_matches_the_gold(self, dtype, threshold, policy):
        x, (codes, scale) = activation(17, 96, dtype, outliers=4), int8_weight(40, 96)
        bias = torch.randn(40).to(dtype)
        out = linear(x, codes, scale, bias, threshold, policy)
        assert out.dtype == dtype
        assert gold.relative_error(out, gold.linear(x, codes, scale, bias, threshold, policy)) < BOUND[dtype]

    @given(
        m=st.integers(1, 9),
        n=st.integers(1, 33),
        k=st.integers(1, 130),
        outliers=st.integers(0, 9),
        dtype=st.sampled_from(DTYPES),
        threshold=st.sampled_from([0.0, 6.0, 2.0]),
        policy=st.sampled_from(["column", "all"]),
        bias=st.booleans(),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_shape_matches_the_gold(self, m, n, k, outliers, dtype, threshold, policy, bias):
        x, (codes, scale) = activation(m, k, dtype, outliers, seed=k), int8_weight(n, k)
        offset = torch.randn(n, generator=torch.Generator().manual_seed(n)) if bias else None
        want = gold.linear(x, codes, scale, offset, threshold, policy)
        # A value at a tie may take the neighbouring code in fp32: allow one code's worth in one row.
        # Where terms cancel, fp32's roundings are relative to them and not to what is left.
        terms = x.double().abs() @ codes.double().abs().t() * scale.double() + (0 if offset is None else offset.abs())
        slack = 2e-3 * float(want.abs().max()) if policy == "column" else 2.0**-22 * float(terms.max())
        out = linear(x, codes, scale, offset, threshold, policy)
        assert (out.double() - want).abs().max() <= BOUND[dtype] * want.abs().max() + slack

    @pytest.mark.parametrize("shape", [(24,), (1, 24), (5, 24), (2, 3, 24), (2, 3, 4, 24)])
    def test_any_leading_shape(self, shape):
        x, (codes, scale) = torch.randn(shape), int8_weight(7, 24)
        out = linear(x, codes, scale, None, 6.0)
        assert out.shape == (*shape[:-1], 7)
        assert gold.relative_error(out, gold.linear(x, codes, scale, None, 6.0)) < 1e-6

    @pytest.mark.parametrize(("m", "n", "k"), [(0, 7, 24), (5, 0, 24), (5, 7, 0), (0, 0, 0)])
    @pytest.mark.parametrize("policy", ["column", "all"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_empty(self, m, n, k, dtype, policy):
        x = torch.randn(m, k).to(dtype)
        codes, scale = torch.zeros(n, k, dtype=torch.int8), torch.zeros(n)
        bias = torch.randn(n).to(dtype)
        out = linear(x, codes, scale, bias, 6.0, policy)
        assert out.shape == (m, n)
        assert out.dtype == dtype
        assert torch.equal(out, bias.expand(m, n))

    def test_zero_row_gives_the_bias_exactly(self):
        x, (codes, scale) = torch.randn(3, 24), int8_weight(7, 24)
        x[1] = 0
        bias = torch.randn(7)
        assert torch.equal(linear(x, codes, scale, bias, 6.0)[1], bias)

    def test_row_of_outliers_only(self):
        x, (codes, scale) = torch.full((1, 24), 50.0), int8_weight(7, 24)
        assert quantize_rowwise(x, 6.0)[1].item() == 0
        assert gold.relative_error(linear(x, codes, scale, None, 6.0), gold.linear(x, codes, scale, None, 6.0)) < 1e-6

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize(
        ("threshold", "policy"), [(0.0, "column"), (6.0, "column"), (6.0, "element"), (0.0, "all")]
    )
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_and_inf_stay_in_their_row(self, bad, threshold, policy, dtype):
        x, (codes, scale) = activation(4, 24, dtype, outliers=1), int8_weight(7, 24)
        x[2, 5] = bad
        out = linear(x, codes, scale, None, threshold, policy)
        assert not out[2].isfinite().any()
        assert out[[0, 1, 3]].isfinite().all()
        # An infinity marks its column; the other rows are right, whichever way they take.
        want = gold.linear(x[[0, 1, 3]], codes, scale, None, threshold, policy)
        assert gold.relative_error(out[[0, 1, 3]], want) < 2e-2

    def test_nan_and_inf_weights_stay_in_their_channel(self):
        weight = torch.randn(5, 24)
        weight[1, 3], weight[2, 3] = float("nan"), float("inf")
        out = linear(torch.randn(3, 24), *quantize_weight(weight), None, 6.0)
        assert not out[:, [1, 2]].isfinite().any()
        assert out[:, [0, 3, 4]].isfinite().all()

    def test_bf16_output_beyond_fp16_range_does_not_overflow(self):
        x = torch.full((1, 64), 5.0, dtype=torch.bfloat16)
        out = linear(x, *quantize_weight(torch.full((1, 64), 1000.0)), torch.tensor([1000.0]), 6.0)
        assert out.item() == pytest.approx(321000, rel=1e-2)

    def test_bias_of_another_dtype_is_not_touched(self):
        x, (codes, scale) = torch.randn(2, 24).half(), int8_weight(7, 24)
        bias = torch.randn(7)
        before = bias.clone()
        assert linear(x, codes, scale, bias, 6.0).dtype == torch.float16
        assert bias.dtype == torch.float32
        assert torch.equal(bias, before)

    def test_inputs_are_not_changed(self):
        x, (codes, scale) = activation(4, 24, outliers=2).requires_grad_(), int8_weight(7, 24)
        copies = [t.detach().clone() for t in (x, codes, scale)]
        linear(x, codes, scale, None, 6.0)
        assert all(torch.equal(a, b) for a, b in zip((x, codes, scale), copies, strict=True))

    def test_batch_mates_change_a_row_under_column_policy_only(self):
        codes, scale = int8_weight(16, 64)
        row = torch.randn(1, 64)
        alone = torch.cat([row, torch.zeros(1, 64)])
        mate = torch.zeros(1, 64)
        mate[0, ::2] = 20.0
        beside = torch.cat([row, mate])
        for policy, same in (("column", False), ("element", True), ("all", True)):
            a, b = (linear(x, codes, scale, None, 6.0, policy)[0] for x in (alone, beside))
            assert torch.equal(a, b) is same

    @pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
    def test_non_contiguous_activations(self, layout):
        base = torch.randn(24, 24)
        x = {"transposed": base.t(), "strided": base[:, ::2], "expanded": base[:1].expand(5, 24)}[layout]
        codes, scale = int8_weight(7, x.shape[1])
        assert torch.equal(linear(x, codes, scale, None, 6.0), linear(x.contiguous(), codes, scale, None, 6.0))

    def test_the_threshold_does_not_matter_where_nothing_is_quantised(self):
        x, (codes, scale) = activation(5, 64, outliers=3), int8_weight(9, 64)
        outs = [linear(x, codes, scale, None, threshold, "all") for threshold in (0.0, 6.0, float("inf"))]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        assert gold.relative_error(outs[0], x.double() @ (codes.double() * scale.double()[:, None]).t()) < 1e-6

    def test_weight_too_wide_for_int32_is_refused(self):
        k = MAX_IN_FEATURES + 1
        with pytest.raises(ValueError, match=rf"in_features={k} is more than {MAX_IN_FEATURES}.*split the weight"):
            linear(torch.zeros(1, k), torch.zeros(1, k, dtype=torch.int8), torch.zeros(1), None, 6.0)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.ones(2, 24, dtype=torch.float64)}, r"x has dtype (torch\.float64|Double)"),
            ({"x": torch.ones(2, 23)}, "it takes 24 features, but x has 23"),
            ({"x": torch.tensor(1.0)}, "x is a scalar"),
            ({"weight": torch.ones(7, 24)}, r"weight is (torch\.float32|Float)"),
            ({"weight_scale": torch.ones(6)}, r"weight_scale is .*\[6\].*; expected (float32|Float) \[7\]"),
            ({"bias": torch.ones(6)}, r"bias is \[6\].*; expected \[7\]"),
            ({"threshold": -1.0}, r"threshold=-1; expected 0 \(no outliers\) or at least"),
            ({"outlier_policy": "row"}, "outlier_policy='row'; expected one of 'column', 'element', 'none', 'all'"),
        ],
    )
    def test_bad_arguments_are_named(self, change, message):
        codes, scale = int8_weight(7, 24)
        good = {"x": torch.ones(2, 24), "weight": codes, "weight_scale": scale, "bias": None, "threshold": 6.0}
        with pytest.raises(ValueError, match=message):
            linear(**(good | change))


@pytest.mark.usefixtures("_each_provider")
class TestScaledMm:
    @pytest.mark.parametrize(("dtype", "out_dtype"), list(itertools.product(DTYPES, DTYPES)))
    def test_equals_linear_and_gives_any_dtype(self, dtype, out_dtype):
        x, (codes, scale) = activation(5, 64, dtype, outliers=2), int8_weight(9, 64)
        out = scaled_mm(*_quantized(x, 6.0), codes, scale, None, out_dtype)
        assert out.dtype == out_dtype
        if out_dtype == dtype:
            assert torch.equal(out, linear(x, codes, scale, None, 6.0))
        assert gold.relative_error(out, gold.linear(x, codes, scale, None, 6.0)) < max(BOUND[dtype], BOUND[out_dtype])

    def test_no_mask_means_no_outlier_product(self):
        x, (codes, scale) = activation(5, 64, outliers=2), int8_weight(9, 64)
        q, row_scale, _ = quantize_rowwise(x, 0.0)
        out = scaled_mm(q, row_scale, x, None, codes, scale, None, torch.float32)
        assert torch.equal(out, linear(x, codes, scale, None, 0.0))

    def test_mismatched_activation_is_named(self):
        x, (codes, scale) = torch.randn(5, 64), int8_weight(9, 64)
        q, row_scale, outliers = quantize_rowwise(x, 6.0)
        with pytest.raises(ValueError, match=r"codes is .*\[5, 64\].* expected .*\[4, 64\]"):
            scaled_mm(q, row_scale, x[:4], outliers, codes, scale, None, torch.float32)


def _quantized(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, ...]:
    q, row_scale, outliers = quantize_rowwise(x, threshold)
    return q, row_scale, x, outliers


class TestAutocast:
    def test_linear_takes_x_in_the_autocast_dtype(self):
        x, (codes, scale) = activation(5, 64, outliers=2), int8_weight(9, 64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear(x, codes, scale, None, 6.0)
            shared = scaled_mm(*_quantized(x, 6.0), codes, scale, None, torch.bfloat16)
        assert torch.equal(out, linear(x.bfloat16(), codes, scale, None, 6.0))
        assert torch.equal(shared, out)


def _opcheck_cases():
    for dtype, shape in itertools.product(DTYPES, [(3, 16), (2, 3, 16), (16,), (0, 16)]):
        yield pytest.param(dtype, shape, id=f"{dtype}-{shape}".replace("torch.", ""))


@pytest.mark.parametrize(("dtype", "shape"), list(_opcheck_cases()))
def test_opcheck(dtype, shape):
    x = torch.randn(shape).to(dtype)
    (codes, scale), bias = int8_weight(5, 16), torch.randn(5)
    torch.library.opcheck(quantize_weight, (torch.randn(5, 16).to(dtype),))
    torch.library.opcheck(quantize_rowwise, (x, 6.0))
    for threshold, policy, offset in (
        (6.0, "column", bias),
        (0.0, "column", None),
        (6.0, "element", None),
        (0.0, "all", bias),
    ):
        leaf = x.clone().requires_grad_()
        torch.library.opcheck(linear, (leaf, codes, scale, offset, threshold, policy))
    q, row_scale, outliers = quantize_rowwise(x, 6.0)
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(scaled_mm, (q, row_scale, leaf, outliers, codes, scale, bias, dtype))
