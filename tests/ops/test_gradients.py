"""Gradients of the operators: the C++ ones of csrc/ops, the Python ones that serve everywhere else, and the gold."""

import itertools
import subprocess
import sys

import gold
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from int8compile.native import loader
from int8compile.ops import input_gradient, linear, master_linear, quantize_rowwise, quantize_weight, scaled_mm
from int8compile.ops._library import REFERENCES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BOUND = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(autouse=True, scope="module")
def _native():
    loader.load("cpu")  # its gradients take the place of Python's for CPU tensors


def problem(m: int, n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0):
    torch.manual_seed(seed)
    codes, scale = quantize_weight(torch.randn(n, k))
    x = torch.randn(m, k)
    x[:, : k // 8] *= 8
    return x.to(dtype), codes, scale, torch.randn(m, n).to(dtype)


def forward(product: str, x, codes, scale, bias, threshold: float):
    if product == "linear":
        return linear(x, codes, scale, bias, threshold)
    q, row_scale, outliers = quantize_rowwise(x, threshold)
    return scaled_mm(q, row_scale, x, outliers if threshold else None, codes, scale, bias, x.dtype)


@pytest.mark.parametrize("product", ["linear", "scaled_mm"])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_passes_through_the_dequantized_weight(product, threshold, dtype):
    x, codes, scale, grad = problem(10, 9, 64, dtype)
    want = grad.double() @ (codes.double() * scale.double().unsqueeze(1))
    x, grad = x.reshape(2, 5, 64).requires_grad_(), grad.reshape(2, 5, 9)
    bias = torch.randn(9, requires_grad=True)
    forward(product, x, codes, scale, bias, threshold).backward(grad)
    assert x.grad.dtype == dtype
    assert gold.relative_error(x.grad.flatten(0, 1), want) < 2 * BOUND[dtype]
    assert gold.relative_error(bias.grad, grad.double().sum((0, 1))) < 1e-6


@pytest.mark.parametrize("product", ["linear", "scaled_mm"])
@pytest.mark.parametrize("threshold", [6.0, 0.0])
@pytest.mark.parametrize(("of_x", "of_bias"), list(itertools.product([True, False], [True, False, None])))
def test_each_gradient_alone(product, threshold, of_x, of_bias):
    """Of x, of the bias, of neither, and with no bias at all (None)."""
    x, codes, scale, grad = problem(4, 9, 32)
    bias = None if of_bias is None else torch.randn(9).half().requires_grad_(of_bias)
    out = forward(product, x.requires_grad_(of_x), codes, scale, bias, threshold)
    assert out.requires_grad == bool(of_x or of_bias)
    if not out.requires_grad:
        return
    out.backward(grad)
    assert (x.grad is not None) == of_x
    if of_x:
        assert torch.equal(x.grad, input_gradient(grad, codes, scale, x.dtype))
    if bias is not None:
        assert (bias.grad is not None) == of_bias
        assert bias.grad is None or bias.grad.dtype == torch.half


def test_only_what_is_asked_for_is_computed():
    x, codes, scale, grad = problem(4, 9, 32)
    bias = torch.randn(9, requires_grad=True)
    out = linear(x.requires_grad_(), codes, scale, bias, 6.0)
    (of_bias,) = torch.autograd.grad(out, bias, grad)
    assert gold.relative_error(of_bias, grad.double().sum(0)) < 1e-6


def test_a_vector_has_gradients_too():
    x, codes, scale, grad = problem(1, 9, 32)
    x, bias = x[0].requires_grad_(), torch.randn(9, requires_grad=True)
    linear(x, codes, scale, bias, 6.0).backward(grad[0])
    assert x.grad.shape == (32,)
    assert torch.equal(bias.grad, grad[0])


def test_no_grad_records_nothing():
    x, codes, scale, _ = problem(4, 9, 32)
    with torch.no_grad():
        assert not linear(x.requires_grad_(), codes, scale, None, 6.0).requires_grad
    with torch.inference_mode():
        assert not linear(x, codes, scale, None, 6.0).requires_grad


def test_quantized_activations_carry_no_gradient():
    outputs = quantize_rowwise(torch.randn(3, 8, requires_grad=True), 6.0)
    assert not any(t.requires_grad for t in outputs)


@pytest.mark.parametrize("product", ["linear", "scaled_mm", "reference"])
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_forward_mode_is_refused(product, grad_enabled):
    """An operator that knows nothing of tangents drops them: torch.func.jvp would say that the derivative is 0."""
    x, codes, scale, _ = problem(4, 9, 32)

    def function(x):
        if product == "reference":
            return REFERENCES[linear](x, codes, scale, None, 0.0)
        return forward(product, x, codes, scale, None, 0.0)

    with torch.set_grad_enabled(grad_enabled):
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            torch.func.jvp(function, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            with pytest.raises(NotImplementedError, match="forward-mode tangent"):
                function(torch.autograd.forward_ad.make_dual(x, x))
            assert torch.equal(function(x), function(x.clone()))


@pytest.mark.parametrize("operand", ["bias", "weight_scale", "weight", "grad"])
def test_forward_mode_is_refused_of_every_operand(operand):
    x, codes, scale, _ = problem(4, 9, 32)
    function, tensor = {
        "bias": (lambda bias: linear(x, codes, scale, bias, 0.0), torch.randn(9)),
        "weight_scale": (lambda scale: linear(x, codes, scale, None, 0.0), scale),
        "weight": (lambda weight: master_linear(x, weight, None, 0.0), torch.randn(9, 32)),
        "grad": (lambda grad: input_gradient(grad, codes, scale, torch.float32), torch.randn(4, 9)),
    }[operand]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode tangent"):
        function(torch.autograd.forward_ad.make_dual(tensor, tensor))


def test_gradient_of_a_gradient():
    codes, scale = quantize_weight(torch.randn(9, 16))
    x = torch.randn(3, 16, requires_grad=True)
    out = linear(x, codes, scale, None, 6.0)
    weights = torch.randn(3, 9, requires_grad=True)
    (grad,) = torch.autograd.grad(out, x, weights, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), weights)
    want = (codes.double() * scale.double().unsqueeze(1)).sum(1).expand(3, 9)
    assert gold.relative_error(second, want) < 1e-5


@settings(deadline=None, max_examples=40)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 300),
    k=st.sampled_from([1, 7, 64, 500, 4099]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 99),
)
def test_native_input_gradient_is_the_reference(m, n, k, dtypes, seed):
    _, codes, scale, grad = problem(m, n, k, dtypes[0], seed)
    got = input_gradient(grad, codes, scale, dtypes[1])
    want = REFERENCES[input_gradient](grad, codes, scale, dtypes[1])
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    # Of 16-bit products one library may round where another does not; sums of n terms in another order.
    torch.testing.assert_close(got.float(), want.float(), rtol=2 * BOUND[dtypes[1]], atol=4 * BOUND[dtypes[1]] * n**0.5)


def test_weight_rows_may_lie_anywhere():
    _, codes, scale, grad = problem(5, 12, 64)
    wide = torch.cat([codes, codes], dim=1)
    assert torch.equal(
        input_gradient(grad, wide[:, :64], scale, torch.float32), input_gradient(grad, codes, scale, torch.float32)
    )
    assert torch.equal(
        input_gradient(grad.t().contiguous().t(), codes, scale, torch.float32),
        input_gradient(grad, codes, scale, torch.float32),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.rand(9, 4)}, "weight is .*expected int8"),
        ({"grad": torch.rand(3, 8)}, r"grad is .*\[3, 8\].*9\]"),
        ({"weight_scale": torch.rand(8)}, r"weight_scale is .*\[8\]"),
        ({"dtype": torch.float64}, "dtype="),
    ],
)
@pytest.mark.parametrize("body", [input_gradient, REFERENCES[input_gradient]], ids=["native", "reference"])
def test_bad_arguments_are_named(change, message, body):
    codes, scale = quantize_weight(torch.randn(9, 4))
    good = {"grad": torch.rand(3, 9), "weight": codes, "weight_scale": scale, "dtype": torch.float32}
    with pytest.raises(ValueError, match="int8compile::input_gradient: " + message):
        body(**(good | change))


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    _, codes, scale, grad = problem(3, 9, 16, dtype)
    for shape in [(3, 9), (3, 1, 9), (0, 9), (9,)]:
        some = grad.flatten()[: torch.Size(shape).numel()].reshape(shape).clone()
        torch.library.opcheck(input_gradient, (some.requires_grad_(), codes, scale, dtype))


PYTHON_GRADIENTS = """
import torch, int8compile.ops as ops
torch.manual_seed(0)
codes, scale = ops.quantize_weight(torch.randn(9, 32))
for outliers in (True, False):
    x, bias = torch.randn(4, 32).mul(3).requires_grad_(), torch.randn(9, requires_grad=True)
    grad = torch.randn(4, 9)
    q, row_scale, columns = ops.quantize_rowwise(x, 6.0)
    mask = columns if outliers else None
    outs = [ops.linear(x, codes, scale, bias, 6.0),
            ops.scaled_mm(q, row_scale, x, mask, codes, scale, bias, torch.float32)]
    for out in outs:
        got = torch.autograd.grad(out, (x, bias), grad)
        torch.testing.assert_close(got[0], grad @ (codes * scale[:, None]))
        torch.testing.assert_close(got[1], grad.sum(0))
assert not any("cpu" in path for path in torch.ops.loaded_libraries), torch.ops.loaded_libraries
"""


def test_python_gradients_say_the_same_where_there_is_no_native_code():
    subprocess.run([sys.executable, "-c", PYTHON_GRADIENTS], check=True, cwd="/")
