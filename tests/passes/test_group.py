"""Grouped-query attention that reads each key/value head once: equal to the bit, and only where nothing is lost."""

import pytest
import torch
from compiling import compile_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from int8compile import dump, last_report

attend = functional.scaled_dot_product_attention


def copies(x, groups):
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, groups, s, d).reshape(b, h * groups, s, d)


def attention(q, k, v, mask=None):
    groups = q.shape[1] // k.shape[1]
    return attend(q, copies(k, groups), copies(v, groups), attn_mask=mask)


def tensors(batch=2, heads=2, groups=3, queries=5, keys=7, width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, heads * groups, queries, width), *[(batch, heads, keys, width)] * 2)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)


def grouped(function, *args, **options):
    """The result of a compiled function, and how many attentions the pass rewrote."""
    torch._dynamo.reset()
    # (What goes on from there gives results that are equal up to rounding only.)
    out = compile_eager(function, **{"disable_passes": ["fold_queries"], "attention": "torch", **options})(*args)
    return out, last_report().graphs[-1].pass_counts.get("group_heads")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    groups=st.integers(2, 4),
    queries=st.integers(1, 6),
    keys=st.integers(2, 40),
    width=st.sampled_from([8, 20, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    masked=st.booleans(),
)
def test_the_result_is_equal_to_the_bit(batch, heads, groups, queries, keys, width, dtype, masked):
    inputs = tensors(batch, heads, groups, queries, keys, width, dtype)
    mask = torch.arange(keys) <= torch.arange(queries)[:, None] if masked else None
    out, changes = grouped(attention, *inputs, mask)
    assert changes == 1
    assert torch.equal(out, attention(*inputs, mask))


def test_dynamic_sizes_match():
    torch._dynamo.reset()
    compiled = compile_eager(attention, attention="torch")
    for keys in (7, 9, 11):  # the second makes their number symbolic
        inputs = tensors(keys=keys)
        assert torch.equal(compiled(*inputs), attention(*inputs))
    assert len(compiled.graphs) == 2
    assert all("enable_gqa" in dump(gm) for gm in compiled.graphs)


def test_a_disabled_pass_does_nothing():
    assert grouped(attention, *tensors(), disable_passes=["group_heads"])[1] is None


def _changed_between(q, k, v):
    k_copies, v_copies = copies(k, 3), copies(v, 3)
    k.mul_(2)
    return attend(q, k_copies, v_copies)


def _other_order(q, k, v):  # head h of the query meets key h % heads, which grouping does not mean
    return attend(q, k.repeat(1, 3, 1, 1), v.repeat(1, 3, 1, 1))


def _one_of_two(q, k, v):
    return attend(q, copies(k, 3), v.repeat(1, 3, 1, 1))


def _with_gradients(q, k, v):
    with torch.enable_grad():
        return attention(q, k, v)


@pytest.mark.parametrize("function", [_changed_between, _other_order, _one_of_two, _with_gradients])
def test_what_it_must_leave_alone(function):
    expected = function(*tensors())
    out, changes = grouped(function, *tensors())
    assert changes == 0
    assert torch.equal(out, expected)


def test_copies_that_something_else_reads_stay():
    def both(q, k, v):
        k_copies = copies(k, 3)
        return attend(q, k_copies, copies(v, 3)), k_copies

    inputs = tensors()
    (out, k_copies), changes = grouped(both, *inputs)
    assert changes == 1
    assert torch.equal(out, attention(*inputs))
    assert torch.equal(k_copies, copies(inputs[1], 3))
