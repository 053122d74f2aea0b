"""Attention of one query with the query heads of a group as rows: the same up to rounding, and only where it may."""

import pytest
import torch
from compiling import compile_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from int8compile import cpuinfo, last_report
from int8compile.native import tuned

attend = functional.scaled_dot_product_attention


def attention(q, k, v, mask=None, **options):
    return attend(q, k, v, attn_mask=mask, enable_gqa=True, **options)


def tensors(batch=2, heads=2, groups=3, queries=1, keys=7, width=8, out_width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads * groups, queries, width), (batch, heads, keys, width), (batch, heads, keys, out_width))
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def folded(function, *args, **options):
    """The result of a compiled function, and how many attentions the pass rewrote."""
    torch._dynamo.reset()
    out = compile_eager(function, **{"attention": "torch", **options})(*args)
    return out, last_report().graphs[-1].pass_counts.get("fold_queries")


def reference(q, k, v, mask=None, scale=None):
    """In float64, head by head."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, 1) for x in (k, v))
    scores = q.double() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask.double()
    return scores.softmax(-1) @ v


def described(folder, vendor):
    path = folder / vendor
    path.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    return path


@pytest.fixture(autouse=True)
def _inference(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(cpuinfo, "CPUINFO", described(tmp_path, "AuthenticAMD"))
    with torch.no_grad():
        yield


MASKS = {
    "none": lambda b, h, s: None,
    "[1, S]": lambda b, h, s: (torch.arange(s) < max(1, s - 2))[None],
    "[1, 1, 1, S]": lambda b, h, s: (torch.arange(s) < max(1, s - 2))[None, None, None],
    "[B, 1, 1, S]": lambda b, h, s: torch.arange(s) <= torch.arange(b)[:, None, None, None],
    "[B, H, 1, S], additive": lambda b, h, s: torch.randn(b, h, 1, s),
    "[H, 1, S], additive": lambda b, h, s: torch.randn(h, 1, s),
}
BOUND = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(2, 4),
    keys=st.integers(1, 40),
    width=st.sampled_from([8, 20, 64]),
    out_width=st.sampled_from([8, 64]),
    dtype=st.sampled_from(list(BOUND)),
    mask=st.sampled_from(list(MASKS)),
    scale=st.sampled_from([None, 0.3]),
)
def test_the_result_is_that_of_float64(batch, heads, groups, keys, width, out_width, dtype, mask, scale):
    q, k, v = tensors(batch, heads, groups, 1, keys, width, out_width, dtype)
    made = MASKS[mask](batch, heads * groups, keys)
    made = made.to(dtype) if made is not None and made.is_floating_point() else made
    out, changes = folded(lambda *args: attention(*args, scale=scale), q, k, v, made)
    expected = reference(q, k, v, made, scale)
    assert changes == 1
    assert out.shape == expected.shape
    assert out.dtype is dtype
    assert (out.double() - expected).abs().max() <= BOUND[dtype] * max(1.0, float(expected.abs().max()))


def test_heads_as_transformers_copies_them():
    """group_heads makes a grouped attention of them, and fold_queries takes that."""

    def copied(q, k, v):
        k, v = (x[:, :, None].expand(2, 2, 3, 7, 8).reshape(2, 6, 7, 8) for x in (k, v))
        return attend(q, k, v)

    inputs = tensors()
    out, changes = folded(copied, *inputs)
    assert changes == 1
    torch.testing.assert_close(out.double(), reference(*inputs), rtol=1e-5, atol=1e-5)


def test_rows_masked_altogether_are_as_pytorch_gives_them():
    inputs = tensors()
    for mask in (torch.zeros(2, 1, 1, 7, dtype=torch.bool), torch.full((2, 6, 1, 7), -torch.inf)):
        out, changes = folded(attention, *inputs, mask)
        assert changes == 1
        torch.testing.assert_close(out, attention(*inputs, mask), equal_nan=True)


def test_dynamic_sizes():
    torch._dynamo.reset()
    compiled = compile_eager(attention, attention="torch")
    for batch, keys in ((2, 7), (3, 9), (4, 11)):  # the second makes both symbolic
        inputs = tensors(batch=batch, keys=keys)
        torch.testing.assert_close(compiled(*inputs).double(), reference(*inputs), rtol=1e-5, atol=1e-5)
        assert last_report().graphs[-1].pass_counts["fold_queries"] == 1


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_bfloat16_is_left_alone_where_its_single_row_is_fast(monkeypatch, tmp_path, vendor):
    monkeypatch.setattr(cpuinfo, "CPUINFO", described(tmp_path, vendor))
    for dtype in BOUND:
        expected = 0 if dtype is torch.bfloat16 and vendor == "GenuineIntel" else 1
        assert folded(attention, *tensors(dtype=dtype))[1] == expected


def test_a_disabled_pass_does_nothing():
    assert folded(attention, *tensors(), disable_passes=["fold_queries"])[1] is None


def _with_gradients(q, k, v):
    with torch.enable_grad():
        return attention(q, k, v)


def _reshaped(q, k, v):
    q = q.clone()
    out = attention(q, k, v)
    q.squeeze_(2)
    return out


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(attention, tensors(queries=2), id="two queries"),
        pytest.param(lambda q, k, v: attention(q, k, v, is_causal=True), tensors(), id="causal"),
        pytest.param(_with_gradients, tensors(), id="gradients"),
        pytest.param(_reshaped, tensors(), id="reshaped in place"),
        pytest.param(attention, tensors(groups=1), id="no groups"),
        pytest.param(attend, tensors(heads=1, groups=1), id="one head"),
    ],
)
def test_what_it_must_leave_alone(function, inputs):
    expected = function(*inputs)
    out, changes = folded(function, *inputs)
    assert changes == 0
    assert torch.equal(out, expected)


@pytest.mark.parametrize(("threads", "changes"), [(1, 1), (2, 1), (4, 1), (6, 0), (8, 0)])
def test_threads_that_would_have_nothing_to_do(monkeypatch, threads, changes):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert folded(attention, *tensors(heads=2, groups=3))[1] == changes


@pytest.fixture
def measured(monkeypatch):
    """Let a form be what was measured to be the fastest."""

    def found(form):
        asked = []
        monkeypatch.setattr(tuned, "choice", lambda *name, **keys: asked.append((*name, keys)) or form)
        return asked

    return found


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    keys=st.integers(1, 40),
    dtype=st.sampled_from(list(BOUND)),
    mask=st.sampled_from(list(MASKS)),
    scale=st.sampled_from([None, 0.3]),
)
def test_two_rows_have_the_result_of_float64(batch, heads, keys, dtype, mask, scale):
    q, k, v = tensors(batch, heads, 1, 1, keys, 8, 20, dtype)
    made = MASKS[mask](batch, heads, keys)
    made = made.to(dtype) if made is not None and made.is_floating_point() else made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "choice", lambda *name, **keys: "two rows")
        out, changes = folded(lambda *args: attend(*args, scale=scale), q, k, v, made)
    expected = reference(q, k, v, made, scale)
    assert changes == 1
    assert out.shape == expected.shape
    assert (out.double() - expected).abs().max() <= BOUND[dtype] * max(1.0, float(expected.abs().max()))


def test_what_was_measured_goes_before_the_default(measured, monkeypatch, tmp_path):
    asked = measured("folded")
    monkeypatch.setattr(cpuinfo, "CPUINFO", described(tmp_path, "GenuineIntel"))
    inputs = tensors(dtype=torch.bfloat16)
    out, changes = folded(attention, *inputs)
    assert changes == 1
    assert (out.double() - reference(*inputs)).abs().max() < 2e-2
    assert asked == [("fold_queries", {"threads": 1, "dtype": "bfloat16", "heads": 6, "kv_heads": 2})]
    measured("as it is")
    assert folded(attention, *tensors())[1] == 0


@pytest.mark.parametrize("form", ["two rows", "fastest", "", None])
def test_a_form_that_grouped_heads_have_not_leaves_the_default(measured, form):
    measured(form)
    assert folded(attention, *tensors())[1] == 1


def test_a_form_that_heads_without_groups_have_not_leaves_them_alone(measured):
    measured("folded")
    inputs = tensors(groups=1)
    out, changes = folded(attention, *inputs)
    assert changes == 0
    assert torch.equal(out, attention(*inputs))


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(attention, tensors(groups=1, queries=2), id="two queries"),
        pytest.param(lambda q, k, v: attend(q, k, v, is_causal=True), tensors(groups=1), id="causal"),
        pytest.param(lambda q, k, v: attend(q, k, v, dropout_p=0.5), tensors(groups=1), id="dropout"),
        pytest.param(_with_gradients, tensors(groups=1), id="gradients"),
        pytest.param(_reshaped, tensors(groups=1), id="reshaped in place"),
        pytest.param(lambda q, k, v: attend(q, k[:1], v[:1]), tensors(groups=1), id="one batch for all"),
    ],
)
def test_what_two_rows_must_leave_alone(measured, function, inputs):
    measured("two rows")
    assert folded(function, *inputs)[1] == 0
