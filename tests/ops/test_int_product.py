"""The exact int32 product of the reference bodies: every route, on every layout, whatever this CPU has."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from int8compile import Int8Config, handoff
from int8compile.limits import MAX_IN_FEATURES
from int8compile.ops import int_product, linear, quantize_weight
from int8compile.ops._library import REFERENCES
from int8compile.ops.int_product import _cublas_product, _fp32_product, _onednn_product, int8_product


@pytest.fixture(params=[True, False], ids=["int8-cpu", "fp32-cpu"])
def cpu(request, monkeypatch) -> bool:
    """A CPU with int8 dot products, and one without."""
    monkeypatch.setattr(int_product, "cpu_multiplies_int8", lambda: request.param)
    return bool(request.param)


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.long() @ b.long().t()).to(torch.int32)


#: name -> an operand [rows, k] in that layout. Those marked are what oneDNN's product gets wrong as they are.
LAYOUTS = {
    "row-major": lambda r, k: codes(r, k),  # wrong: K = 1
    "transposed": lambda r, k: codes(k, r).t(),
    "rows of a larger one": lambda r, k: codes(r + 3, k)[2 : 2 + r],
    "columns of a larger one": lambda r, k: codes(r, k + 5)[:, 3 : 3 + k],
    "columns of a transposed one": lambda r, k: codes(k, r + 5)[:, 3 : 3 + r].t(),
    "every second row": lambda r, k: codes(2 * r, k)[::2],
    "every second column": lambda r, k: codes(r, 2 * k)[:, ::2],
    "steps both ways": lambda r, k: codes(3 * r, 2 * k)[::3, ::2],
    "a slice of three dimensions": lambda r, k: codes(k, 2, r)[:, 0].t(),
    "an odd storage offset": lambda r, k: codes(r * k + 7)[7:].view(r, k),
    "an odd row stride": lambda r, k: codes(2 * (r + 1) * (k + 1)).as_strided((r, k), (k + 1, 1)),
    "expanded rows": lambda r, k: codes(1, k).expand(r, k),  # wrong
    "expanded columns": lambda r, k: codes(r, 1).expand(r, k),  # wrong
    "expanded both ways": lambda r, k: codes(1, 1).expand(r, k),  # wrong
    "a stride of 0 across a step": lambda r, k: codes(4 * k + 9).as_strided((r, k), (0, 4)),  # wrong
    "overlapping rows": lambda r, k: codes(r + k + 5).as_strided((r, k), (1, 1)),  # wrong
    "rows that overlap by half": lambda r, k: codes(2 * r + k + 5).as_strided((r, k), (2, 1)),  # wrong
    "overlapping columns": lambda r, k: codes(r + 7 * k + 5).as_strided((r, k), (1, 7)),  # wrong
    "a row with a stride of its own": lambda r, k: codes(3 * r + k + 5).as_strided((r, k), (3, 1)),  # wrong: one row
}


@pytest.mark.parametrize("left", LAYOUTS)
def test_any_layout_is_exact(left, cpu):
    for right, (m, n, k) in itertools.product(
        LAYOUTS, [(5, 7, 12), (1, 7, 12), (5, 1, 12), (1, 1, 12), (5, 7, 1), (1, 7, 1), (17, 33, 2), (1, 1, 1)]
    ):
        a, b = LAYOUTS[left](m, k), LAYOUTS[right](n, k)
        assert torch.equal(int8_product(a, b), exact(a, b)), (right, m, n, k)


@pytest.mark.parametrize("left", LAYOUTS)
def test_onednn_gets_strides_of_one_meaning_only(left, monkeypatch):
    """So it is right on a CPU whose ``_int_mm`` is, too: what reaches it is row-major, without a size of 1."""
    real = torch._int_mm

    def onednn(a, b):
        assert min(*a.shape, *b.shape) >= 2
        assert a.stride() == (a.shape[1], 1)
        assert b.stride() == (1, b.shape[0])
        return real(a, b)

    monkeypatch.setattr(torch, "_int_mm", onednn)
    for right, (m, n, k) in itertools.product(LAYOUTS, [(5, 7, 12), (1, 7, 12), (5, 1, 12), (5, 7, 1), (1, 1, 1)]):
        a, b = LAYOUTS[left](m, k), LAYOUTS[right](n, k)
        assert torch.equal(_onednn_product(a, b), exact(a, b)), (right, m, n, k)


def test_what_is_row_major_is_not_copied(monkeypatch):
    given_to = []
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: given_to.append((a, b)) or real(a, b))
    a, b = codes(1, 12), codes(7, 12)
    _onednn_product(a, b)
    assert given_to[0][1].data_ptr() == b.data_ptr()


@pytest.mark.parametrize("k", [1, 3, 100, 1024, 1025, 4100, MAX_IN_FEATURES])
def test_extreme_codes_are_exact(k):
    a = torch.full((2, k), 127, dtype=torch.int8)
    b = torch.stack([a[0], -a[0], a[0] * torch.tensor([1, -1], dtype=torch.int8).repeat(k // 2 + 1)[:k]])
    for product in (_onednn_product(a, b), _fp32_product(a, b.float())):
        assert torch.equal(product, exact(a, b))


@given(m=st.integers(0, 40), n=st.integers(0, 40), k=st.integers(0, 2100), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_any_shape_is_exact(m, n, k, seed):
    torch.manual_seed(seed)
    a, b = codes(m, k), codes(n, k)
    for product in (_onednn_product(a, b), _fp32_product(a, b.float())):
        assert torch.equal(product, exact(a, b))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 5, 3), (16, 8, 8), (17, 9, 100), (40, 1, 1025), (0, 5, 3), (3, 0, 9), (3, 4, 0)]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_padded_cublas_call_is_exact_and_within_its_limits(monkeypatch, m, n, k, dynamic):
    """cuBLASLt takes M > 16 and multiples of 8 above 0; ``_int_mm`` of the CPU stands in for it here."""
    real = torch._int_mm

    def cublas(a, b):
        assert a.shape[0] > 16
        assert a.shape[1] % 8 == b.shape[1] % 8 == 0
        assert min(a.shape[1], b.shape[1]) > 0
        return real(a, b)

    a, b = codes(m, k), codes(n, k)
    if dynamic:
        traced = make_fx(_cublas_product, tracing_mode="symbolic")(a, b)  # as inductor takes the operator apart
        assert torch.equal(traced(a, b), exact(a, b))
    else:
        monkeypatch.setattr(torch, "_int_mm", cublas)
        assert torch.equal(_cublas_product(a, b), exact(a, b))


def reference(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    out: torch.Tensor = REFERENCES[linear](x, *quantize_weight(layer.weight), layer.bias, 6.0, "column")
    return out


OPTIONS = {"min_features": 0, "kernels": "reference", "inductor": {"fx_graph_cache": False}}


def test_the_compiled_reference_has_dynamic_shapes_and_layouts(cpu):
    """One graph a layout, whatever the number of rows, with the bits of the reference in eager."""
    layer = nn.Linear(32, 8).requires_grad_(False)
    compiled = torch.compile(layer, backend="int8", options=OPTIONS, dynamic=True)
    base = torch.randn(32, 64)
    base[3] *= 10
    layouts = {
        "row-major": (torch.randn(5, 32), torch.randn(9, 32)),
        "transposed": (base.t()[:6], base.t()[:11]),
        "expanded": (torch.randn(1, 32).expand(4, 32), torch.randn(1, 32).expand(7, 32)),
        "a row": (torch.randn(32).expand(1, 32), base[:, :1].t()),
    }
    for name, (first, second) in layouts.items():
        assert torch.equal(compiled(first), reference(first, layer)), name
        with torch.compiler.set_stance("default" if name == "a row" else "fail_on_recompile"):
            assert torch.equal(compiled(second), reference(second, layer)), name


def test_the_compiled_reference_takes_numbers_of_rows_that_depend_on_data(cpu):
    layer = nn.Linear(32, 8).requires_grad_(False)
    compiled = torch.compile(lambda x, mask: layer(x[mask]), backend="int8", options=OPTIONS, fullgraph=True)
    x = torch.randn(12, 32)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for rows in (4, 1, 0, 9):
            mask = torch.arange(12) < rows
            assert torch.equal(compiled(x, mask), reference(x[mask], layer))


def test_the_reference_has_the_same_bits_whatever_the_cpu_multiplies(monkeypatch):
    x, weight = torch.randn(9, 1500), torch.randn(40, 1500)
    x[:, 7] *= 30
    outs = []
    for has in (True, False):
        monkeypatch.setattr(int_product, "cpu_multiplies_int8", lambda has=has: has)
        for threshold in (0.0, 6.0):
            outs.append(REFERENCES[linear](x, *quantize_weight(weight), None, threshold, "column"))
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """What oneDNN makes of them where it is held to AVX2."""
    return (a.long() @ b.long()).clamp(-32768, 32767).to(torch.int32)


def test_onednn_is_used_where_the_cpu_has_dot_products_and_it_is_exact(monkeypatch):
    for has, exact_there in itertools.product([True, False], repeat=2):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has=has: has)
        monkeypatch.setattr(torch, "_int_mm", (lambda a, b: (a.long() @ b.long()).int()) if exact_there else saturating)
        int_product._onednn_is_exact.cache_clear()
        assert int_product.cpu_multiplies_int8() is (has and exact_there)
    int_product._onednn_is_exact.cache_clear()


def test_whether_onednn_is_exact_is_found_out_while_tracing(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    want = int_product._largest_codes_are_exact()
    int_product._onednn_is_exact.cache_clear()
    with FakeTensorMode(), torch.device("meta"), torch.inference_mode():
        assert int_product.cpu_multiplies_int8() is want


def test_products_are_exact_where_onednn_is_held_to_avx2():
    """``ONEDNN_MAX_CPU_ISA`` is read once a process."""
    code = (
        "import torch; from int8compile.ops.int_product import int8_product\n"
        "a = torch.full((17, 130), 127, dtype=torch.int8)\n"
        "assert (int8_product(a, a) == 127 * 127 * 130).all()"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cached_graphs_are_of_one_route(monkeypatch):
    """A graph of the reference bodies holds the route they took when it was compiled; inductor's caches do not ask."""
    tags = {}
    for multiplies, native in itertools.product([True, False], repeat=2):
        monkeypatch.setattr(handoff, "cpu_multiplies_int8", lambda multiplies=multiplies: multiplies)
        tags[multiplies, native] = handoff.cache_tag(Int8Config(), native)
    assert tags[True, False] != tags[False, False]
    assert tags[True, True] == tags[False, True]  # native kernels do not use torch's product
