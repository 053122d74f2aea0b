"""Attention by int8compile's kernels: the same up to rounding and laid out as it was, and only where it may."""

import pytest
import torch
from compiling import compile_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import int8compile
from int8compile import Int8Config, dump, last_report
from int8compile.errors import OptionValueError
from int8compile.native import attention as measured
from int8compile.native import loader

sdpa = functional.scaled_dot_product_attention
MASK = torch.arange(40) <= torch.arange(30)[:, None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def attention(q, k, v, mask=None, **options):
    return sdpa(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1], **options)


def tensors(batch=2, heads=2, groups=3, queries=30, keys=40, width=8, out_width=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, queries, heads * groups, width), (batch, keys, heads, width), (batch, keys, heads, out_width))
    return tuple(torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes)


def attended(function, *args, **options):
    """The result of a compiled function, and how many attentions the pass replaced."""
    torch._dynamo.reset()
    out = compile_eager(function, **{"attention": "native", **options})(*args)
    return out, last_report().graphs[-1].pass_counts.get("attend")


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    queries=st.integers(2, 40),
    keys=st.integers(2, 90),
    width=st.sampled_from([8, 20, 64]),
    out_width=st.sampled_from([8, 24]),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(["none", "causal", "[M, N]", "[B, 1, 1, N]", "[1, H, M, N], added"]),
    scale=st.sampled_from([None, 0.3]),
    contiguous=st.booleans(),
)
def test_the_result_is_pytorchs_and_lies_as_it_lay(
    batch, heads, groups, queries, keys, width, out_width, dtype, mask, scale, contiguous
):
    q, k, v = tensors(batch, heads, groups, queries, keys, width, out_width, dtype)
    q = q.contiguous() if contiguous else q
    made = {
        "none": None,
        "causal": None,
        "[M, N]": torch.arange(keys) <= torch.arange(queries)[:, None] + 3,
        "[B, 1, 1, N]": (torch.arange(keys) <= torch.arange(batch)[:, None])[:, None, None],
        "[1, H, M, N], added": torch.randn(1, heads * groups, queries, keys).to(dtype),
    }[mask]
    options = {"scale": scale, "is_causal": mask == "causal"}
    torch._dynamo.reset()
    compiled = compile_eager(lambda *args: attention(*args, **options), attention="native")
    out = compiled(q, k, v, made)
    wide = made.float() if made is not None and made.is_floating_point() else made
    expected = attention(q.float(), k.float(), v.float(), wide, **options)
    assert last_report().graphs[-1].pass_counts["attend"] == 1
    assert out.dtype is dtype
    assert (out.float() - expected).abs().max() <= BOUND[dtype] * max(1.0, float(expected.abs().max()))
    fake = next(n for n in compiled.graphs[0].graph.nodes if n.op == "output").args[0][0].meta["example_value"]
    assert out.stride() == fake.stride()


def test_the_graph():
    compiled = compile_eager(attention, attention="native")
    q, k, v = tensors()
    compiled(q, k, v, MASK)
    assert "int8compile.attention(%0, %1, %2, %3, 0.353553, False)" in dump(compiled.graphs[0])


def test_heads_as_transformers_copies_them():
    def copied(q, k, v, mask):
        k, v = (x[:, :, None].expand(2, 2, 3, 40, 8).reshape(2, 6, 40, 8) for x in (k, v))
        return sdpa(q, k, v, attn_mask=mask)

    inputs = tensors()
    out, changes = attended(copied, *inputs, MASK)
    assert changes == 1
    torch.testing.assert_close(out, attention(*inputs, MASK), rtol=1e-5, atol=1e-5)


def test_dynamic_sizes():
    torch._dynamo.reset()
    compiled = compile_eager(attention, attention="native")
    for batch, queries, keys in ((2, 30, 40), (3, 31, 50), (4, 7, 90), (5, 90, 91)):  # the second makes them symbolic
        inputs = tensors(batch=batch, queries=queries, keys=keys)
        mask = torch.rand(batch, 1, queries, keys) < 0.8
        torch.testing.assert_close(compiled(*inputs, mask), attention(*inputs, mask), rtol=1e-5, atol=1e-5)
        assert last_report().graphs[-1].pass_counts["attend"] == 1
    assert len(compiled.graphs) <= 4  # where sizes had to be compared, those that differ get a graph of their own


def test_through_inductor():
    torch._dynamo.reset()

    def layer(q, k, v, mask):
        out = attention(q * 2, k, v + 1, mask)
        return out.transpose(1, 2).reshape(2, 30, -1) + 1

    inputs = tensors()
    compiled = torch.compile(layer, backend="int8", options={"attention": "native"})
    torch.testing.assert_close(compiled(*inputs, MASK), layer(*inputs, MASK), rtol=1e-5, atol=1e-5)


def test_rows_masked_altogether_are_as_pytorch_gives_them():
    inputs = tensors()
    for mask in (torch.zeros(2, 1, 1, 40, dtype=torch.bool), torch.full((2, 6, 30, 40), -torch.inf)):
        out, changes = attended(attention, *inputs, mask)
        assert changes == 1
        assert torch.equal(out, attention(*inputs, mask))


def test_auto_takes_what_was_measured(monkeypatch):
    loader.load("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    name = measured.kernels(torch.float32)
    monkeypatch.setattr(measured, "FASTER", {name: {"masked": (torch.float32,), "one query": (torch.float16,)}})
    one = tensors(queries=1, groups=1, dtype=torch.float16)
    for inputs, mask, expected in (
        (tensors(), MASK, 1),
        (tensors(), None, 0),
        (tensors(dtype=torch.float16), MASK, 0),
        (tensors(queries=1, groups=1), MASK[:1], 0),
        (one, MASK[:1], int(measured.kernels(torch.float16) == name)),
    ):
        assert attended(attention, *inputs, mask, attention="auto")[1] == expected
    assert attended(lambda q, k, v: attention(q, k, v, is_causal=True), *tensors(), attention="auto")[1] == 1
    monkeypatch.setattr(measured, "FASTER", {})
    assert attended(attention, *tensors(), MASK, attention="auto")[1] == 0


@pytest.mark.parametrize(("threads", "changes"), [(1, 1), (2, 1), (4, 0), (64, 0)])
def test_threads_that_would_have_nothing_to_do(monkeypatch, threads, changes):
    loader.load("cpu")
    monkeypatch.setattr(measured, "FASTER", {measured.kernels(torch.float32): {"masked": (torch.float32,)}})
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = tensors(batch=1, heads=2, groups=4)
    assert attended(attention, *inputs, MASK, attention="auto")[1] == changes
    assert attended(attention, *inputs, MASK, attention="native")[1] == 1


def test_the_table_names_kernels_kinds_and_dtypes_that_there_are():
    assert set(measured.FASTER) <= {"avx512bf16", "avx512", "avx2", "portable"}
    for kinds in measured.FASTER.values():
        assert set(kinds) == {"masked", "whole", "one query"}
        assert all(set(dtypes) <= set(DTYPES) for dtypes in kinds.values())


def _with_gradients(q, k, v):
    with torch.enable_grad():
        return attention(q, k, v)


def _reshaped(q, k, v):
    out = attention(q, k, v)
    out.squeeze_(0)
    return out


def _autocast(q, k, v):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return attention(q, k, v)


def _vmapped(q, k, v):
    return torch.vmap(lambda a: attention(a, k, v))(q[None])


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        pytest.param(_with_gradients, tensors(), id="gradients"),
        pytest.param(_reshaped, tensors(batch=1), id="reshaped in place"),
        pytest.param(_autocast, tensors(), id="autocast"),
        pytest.param(_vmapped, tensors(), id="vmap"),
        pytest.param(attention, tensors(dtype=torch.float64), id="float64"),
        pytest.param(lambda q, k, v: attention(q[0], k[0], v[0]), tensors(groups=1), id="three dimensions"),
        pytest.param(lambda q, k, v: attention(q, k[:1], v[:1]), tensors(), id="a broadcast batch"),
        pytest.param(lambda q, k, v: sdpa(q, k[:, :1], v[:, :1]), tensors(groups=1), id="broadcast heads"),
    ],
)
def test_what_it_must_leave_alone(function, inputs):
    try:
        expected = function(*inputs)
    except RuntimeError:
        pytest.skip("PyTorch does not take it")
    out, changes = attended(function, *inputs)
    assert changes == 0
    assert torch.equal(out, expected)


def test_dropout_is_left_alone():
    out, changes = attended(lambda q, k, v: attention(q, k, v, dropout_p=1.0), *tensors())
    assert changes == 0
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"attention": "torch"}, 0),
        ({"attention": "auto", "kernels": "reference"}, 0),
        ({"disable_passes": ["attend"]}, None),
    ],
)
def test_options_that_leave_pytorchs(options, changes):
    assert attended(attention, *tensors(), MASK, **options)[1] == changes


def test_bad_options():
    with pytest.raises(OptionValueError, match="attention='flash': expected one of 'auto', 'native', 'torch'"):
        Int8Config(attention="flash")
    with pytest.raises(OptionValueError, match="attention='native': expected 'auto' or 'torch'"):
        Int8Config(attention="native", kernels="reference")


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = self.project(x).view(1, 20, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return sdpa(q, k, v, is_causal=True).transpose(1, 2).reshape(1, 20, 16)


def test_the_report_counts_them(caplog):
    torch._dynamo.reset()
    x = torch.randn(1, 20, 16)
    options = {"attention": "native", "min_features": 0}
    report = int8compile.explain(Layer(), x, options=options)
    assert report.attentions == 1
    assert "attention by int8compile's kernels: 1 call" in str(report)
    with caplog.at_level("INFO", logger="int8compile"):
        torch.compile(Layer(), backend="int8", options=options)(x)
    assert "int8: 1 of 1 linears, 1 attention by int8compile's kernels" in caplog.text
    assert "kernels: 1" not in str(int8compile.explain(Layer(), x, options={**options, "attention": "torch"}))


def test_exported_programs_keep_pytorchs():
    model = Layer().eval()
    program = int8compile.export(model, (torch.randn(1, 20, 16),), config={"attention": "native", "min_features": 0})
    assert "int8compile.attention" not in program.graph_module.code
    assert "scaled_dot_product_attention" in program.graph_module.code
