"""int8compile::attention: every set of kernels and the reference against float64, and at the edges as PyTorch's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from int8compile.native import loader
from int8compile.ops import attention
from int8compile.ops._library import REFERENCES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NATIVE = torch.ops.int8compile_native
INF, NAN = float("inf"), float("nan")
#: Of the largest value: a rounding of the result, of the weights where they are rounded, and of the sums.
BOUND = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2, torch.float16: 1.5e-3}


def names() -> list[str]:
    loader.load("cpu")
    return NATIVE.attentions().split()


@pytest.fixture(autouse=True)
def _inference():
    threads = torch.get_num_threads()
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "portable", "avx2", "avx512", "avx512bf16"])
def attend(request):
    """The reference, and each set of kernels in turn; skipped where the CPU has it not."""
    if request.param == "reference":
        yield REFERENCES[attention]
        return
    if request.param not in names():
        pytest.skip(f"this CPU has no {request.param}")
    NATIVE.set_attention(request.param)
    yield attention
    NATIVE.set_attention("auto")


def exact(q, k, v, mask=None, scale=1.0, causal=False):
    """In float64, by plain matrices; rows without a visible key are 0."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.mT * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -INF) if mask.dtype is torch.bool else scores + mask.double()
    return (scores.softmax(-1).nan_to_num(0.0) if scores.isneginf().all(-1).any() else scores.softmax(-1)) @ v


def rows(batch, heads, count, width, dtype, layout, generator):
    """[batch, heads, count, width] of values, laid out in one of the ways that models have."""

    def made(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    if layout == "positions first":
        return made(batch, count, heads, width).transpose(1, 2)
    if layout == "a slice":
        return made(batch, heads, count + 3, width + 5)[:, :, 2 : count + 2, 1 : width + 1]
    if layout == "columns first":
        return made(batch, heads, width, count).transpose(2, 3)
    if layout == "one batch":
        return made(1, heads, count, width).expand(batch, -1, -1, -1)
    return made(batch, heads, count, width)


LAYOUTS = ["plain", "positions first", "a slice", "columns first", "one batch"]
MASKS = {
    "none": lambda b, h, m, n, dtype: None,
    "causal": lambda b, h, m, n, dtype: torch.arange(n) <= torch.arange(m)[:, None] + max(0, n - m) // 2,
    "random": lambda b, h, m, n, dtype: (torch.rand(m, n) < 0.6),
    "rows hidden": lambda b, h, m, n, dtype: (torch.rand(b, 1, m, 1) < 0.5).expand(b, 1, m, n),
    "padding": lambda b, h, m, n, dtype: torch.arange(n) < torch.randint(0, n + 1, (b, 1, 1, 1)),
    "left padding": lambda b, h, m, n, dtype: torch.arange(n) >= torch.randint(0, n + 1, (b, 1, 1, 1)),
    "a window": lambda b, h, m, n, dtype: (torch.arange(n) - torch.arange(m)[:, None]).abs() < 9,
    "added": lambda b, h, m, n, dtype: torch.randn(b, h, m, n).to(dtype),
    "a head's": lambda b, h, m, n, dtype: torch.randn(h, 1, n).to(dtype),
    "lowest": lambda b, h, m, n, dtype: torch.where(torch.rand(m, n) < 0.5, 0.0, torch.finfo(dtype).min).to(dtype),
    "minus infinity": lambda b, h, m, n, dtype: torch.where(torch.rand(b, 1, m, n) < 0.5, 0.0, -INF).to(dtype),
    "a column": lambda b, h, m, n, dtype: torch.rand(m, 1) < 0.7,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 3, 7]),
    queries=st.sampled_from([1, 2, 5, 17, 64, 65, 130]),
    keys=st.sampled_from([1, 2, 15, 16, 63, 64, 65, 129, 200]),
    width=st.sampled_from([1, 2, 7, 16, 33, 64, 80]),
    value_width=st.sampled_from([1, 8, 15, 64, 72, 130]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from([*MASKS, "is_causal"]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    scale=st.sampled_from([0.125, 0.4, 0.0, -0.2]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_the_result_is_that_of_float64(
    batch, kv_heads, groups, queries, keys, width, value_width, dtype, mask, layouts, scale, threads, seed
):
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    heads = kv_heads * groups
    q = rows(batch, heads, queries, width, dtype, layouts[0], generator)
    k = rows(batch, kv_heads, keys, width, dtype, layouts[1], generator)
    v = rows(batch, kv_heads, keys, value_width, dtype, layouts[2], generator)
    causal = mask == "is_causal"
    made = None if causal else MASKS[mask](batch, heads, queries, keys, dtype)
    expected = exact(q, k, v, made, scale, causal)
    bound = BOUND[dtype] * max(1.0, float(v.abs().max()))
    outputs = {"reference": REFERENCES[attention](q, k, v, made, scale, causal)}
    for name in names():
        NATIVE.set_attention(name)
        outputs[name] = attention(q, k, v, made, scale, causal)
        torch.set_num_threads(1)
        assert torch.equal(attention(q, k, v, made, scale, causal), outputs[name]), f"{name}: threads change it"
        torch.set_num_threads(threads)
    NATIVE.set_attention("auto")
    for name, out in outputs.items():
        assert (out.dtype, out.shape) == (dtype, expected.shape), name
        error = float((out.double() - expected).abs().max())
        assert error <= bound, f"{name}: {error:.3g}, bound {bound:.3g}"


def tensors(dtype=torch.float32, queries=70, keys=150, heads=2, groups=3, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, heads * groups, queries, width), *[(1, heads, keys, width)] * 2)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_rows_beside_it(attend, dtype):
    q, k, v = tensors(dtype)
    mask = torch.arange(150) <= torch.arange(70)[:, None] + 40
    whole = attend(q, k, v, mask, 0.25)
    if attend is attention:
        for first, last in ((3, 20), (66, 70)):
            assert torch.equal(attend(q[:, :, first:last], k, v, mask[first:last], 0.25), whole[:, :, first:last])
        few = attend(q[:, :, :2], k, v, mask[:2], 0.25)  # groups of 3: up to 8 rows have kernels of their own
        assert torch.equal(attend(q[:, :, :1], k, v, mask[:1], 0.25), few[:, :, :1])
        assert torch.allclose(few.float(), whole[:, :, :2].float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_masked_altogether_are_0(attend, dtype):
    q, k, v = tensors(dtype)
    mask = torch.ones(70, 150, dtype=torch.bool)
    mask[3] = mask[64:] = False
    for made in (mask, torch.where(mask, 0.0, -INF).to(dtype)):
        out = attend(q, k, v, made, 0.25)
        assert (out[:, :, 3] == 0).all()
        assert (out[:, :, 64:] == 0).all()
        assert (out[:, :, 4:64] != 0).any(-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_lowest_numbers_are_averages(attend, dtype):
    """Where the mask is so low that a score is lost in it, all keys weigh the same, as in PyTorch's."""
    q, k, v = (x * 0.01 if i < 2 else x for i, x in enumerate(tensors(torch.float32)))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    low = -1e38 if dtype is not torch.float16 else -65504.0
    out = attend(q, k, v, torch.full((70, 150), low, dtype=dtype), 0.25)
    average = v.double().mean(2, keepdim=True).repeat_interleave(3, 1).expand_as(out)
    torch.testing.assert_close(out.double(), average, rtol=0, atol=2e-2 if dtype is torch.bfloat16 else 2e-3)


def test_what_the_lowest_numbers_hide_adds_nothing(attend):
    q, k, v = tensors()
    mask = torch.arange(150) <= torch.arange(70)[:, None]
    low = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attend(q, k, v, low, 0.25), attend(q, k, v, mask, 0.25), rtol=0, atol=0)


def _nan_rows(out):
    return out.isnan().any(-1)[0].any(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("hidden", [False, True])
def test_nan_and_infinity_come_out_where_pytorch_lets_them(attend, dtype, bad, hidden):
    """In a key or a value, through a mask too; in a query, in its row alone.

    As in float32: of 16-bit tensors PyTorch 2.13 makes 0 where a score is +infinity, and NaN of float32's.
    """
    if attend is not attention:
        pytest.skip("PyTorch's own")
    for operand in range(3):
        inputs = [x.clone() for x in tensors(dtype)]
        inputs[operand][0, 0, 5 if operand == 0 else 149 if hidden else 2, 3] = bad
        mask = torch.arange(150) <= torch.arange(70)[:, None]
        floats = [x.float() for x in inputs]
        want = functional.scaled_dot_product_attention(*floats, mask, scale=0.25, enable_gqa=True)
        got = attend(*inputs, mask, 0.25)
        assert torch.equal(got.isnan(), want.isnan()), ("query", "key", "value")[operand]
        finite = want.isfinite()
        torch.testing.assert_close(got[finite].double(), want[finite].double(), rtol=0, atol=5 * BOUND[dtype])


def test_a_hidden_score_that_overflows_is_not_left_out(attend):
    """Its product with the mask is NaN, in PyTorch's too."""
    q, k, v = tensors()
    q, k = q * 0 + 1e25, k.clone()
    k[:, :, :100] = 1e-30
    k[:, :, 100:] = 1e25
    mask = torch.zeros(70, 150).masked_fill(torch.arange(150) >= 100, -INF)
    assert attend(q, k, v, mask, 1.0).isnan().all()
    visible = attend(q, k[:, :, :100], v[:, :, :100], mask[:, :100], 1.0)
    assert visible.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(attend, dtype):
    """The largest is subtracted before the exponential, so one key takes all."""
    q, k, v = (x.float() for x in tensors(dtype))
    q, k = (q * 50).to(dtype), (k * 50).to(dtype)
    out = attend(q, k, v.to(dtype), None, 1.0)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), exact(q, k, v.to(dtype)), rtol=0, atol=0.15)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys(attend, sizes):
    out = attend(*tensors(queries=sizes[0], keys=sizes[1]), None, 0.25)
    assert out.shape == (1, 6, sizes[0], 16)
    assert (out == 0).all()
    batch = [x[:0] for x in tensors()]
    assert attend(*batch, None, 0.25).shape == (0, 6, 70, 16)


def test_the_exponential_is_as_exact_as_it_says(attend):
    """Two keys of score 0 and x: the weights are 1 / (1 + exp(x)) and exp(x) / (1 + exp(x))."""
    if attend is not attention:
        pytest.skip("PyTorch's own exponential")
    x = -torch.cat([torch.linspace(0, 2, 2000), torch.linspace(2, 86.5, 4000)])
    q, k = torch.ones(1, 1, len(x), 1), torch.zeros(1, 1, 2, 1)
    mask = torch.stack([torch.zeros_like(x), x], 1)
    v = torch.eye(2)[None, None]
    weight = attend(q, k, v, mask, 1.0)[0, 0].double()
    expected = torch.stack([1 / (1 + x.double().exp()), x.double().exp() / (1 + x.double().exp())], 1)
    relative = ((weight - expected) / expected).abs()
    assert (relative <= 1.2e-7 * (3 + x.double().abs()[:, None])).all(), float(relative.max())


def test_opcheck(attend):
    if attend is not attention:
        pytest.skip("the operator as it is registered")
    for dtype in DTYPES:
        q, k, v = tensors(dtype, queries=5, keys=9)
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        for mask, causal in ((None, False), (None, True), (torch.ones(5, 9, dtype=torch.bool).tril(), False)):
            torch.library.opcheck(attention, (q, k, v, mask, 0.25, causal))


def test_gradients_are_refused():
    loader.load("cpu")
    q, k, v = tensors(queries=3, keys=4)
    with torch.enable_grad():
        for i in range(3):
            inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
            with pytest.raises(NotImplementedError, match="has no gradient, and an operand needs one"):
                attention(*inputs, None, 0.25)
        attention(q, k, v, None, 0.25)
    inputs = (q.clone().requires_grad_(), k, v)
    assert not attention(*inputs, None, 0.25).requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v: (q[0], k, v, None), r"query is \[6, 70, 16\]; expected \[B, H, M, D\]"),
        (lambda q, k, v: (q.double(), k.double(), v.double(), None), "query has dtype .*ouble|float64"),
        (lambda q, k, v: (q, k.bfloat16(), v, None), "key is .*expected .*H being a multiple of Hkv"),
        (lambda q, k, v: (q, k[..., :8], v, None), "key is .*expected .*H being a multiple of Hkv"),
        (lambda q, k, v: (q[:, :5], k, v, None), "key is .*expected .*H being a multiple of Hkv"),
        (lambda q, k, v: (q, k, v[:, :, :3], None), "value is .*expected .*as key is"),
        (lambda q, k, v: (q, k, v, torch.zeros(70, 149)), "mask is .*that broadcast to"),
        (lambda q, k, v: (q, k, v, torch.zeros(70, 150, dtype=torch.float64)), "mask is .*that broadcast to"),
        (lambda q, k, v: (q, k, v, torch.zeros(150)), "mask is .*that broadcast to"),
        (lambda q, k, v: (q, k, v, torch.zeros(70, 150), 0.25, True), "is_causal=True and a mask"),
    ],
)
def test_wrong_arguments(attend, change, words):
    arguments = change(*tensors())
    with pytest.raises(ValueError, match=words):
        attend(*(arguments if len(arguments) > 4 else (*arguments, 0.25)))


def test_autocast_changes_nothing():
    loader.load("cpu")
    q, k, v = tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q, k, v, None, 0.25), attention(q, k, v, None, 0.25).float())
    assert attention(q, k, v, None, 0.25).dtype is torch.float32


def test_an_unknown_set_of_kernels_is_an_error():
    loader.load("cpu")
    with pytest.raises(ValueError, match="set_attention: name is 'neon'; this CPU has: auto"):
        NATIVE.set_attention("neon")


@pytest.mark.parametrize(("isa", "expected"), [("portable", "portable"), ("avx2", "avx2")])
def test_the_choice_follows_that_of_the_int8_kernels(isa, expected):
    if isa not in (loader.load("cpu"), NATIVE.isas())[1].split():
        pytest.skip(f"this CPU has no {isa}")
    NATIVE.set_isa(isa)
    try:
        assert {NATIVE.attention(dtype) for dtype in DTYPES} == {expected}
    finally:
        NATIVE.set_isa("auto")
