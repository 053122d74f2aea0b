"""The CUDA kernels' logic, on a CPU: csrc/cuda under ``cuda_emulation`` and AddressSanitizer, against the reference.

Codes, scales and outlier columns are equal to the bit; so are outputs where no outlier product takes part. That product
sums in another order, so it is held to a few fp32 roundings of its terms. What an emulation cannot show (speed, the
order of memory between blocks, the wgmma kernel) is for ``test_gpu.py``.
"""

import itertools
import shutil
import subprocess
from collections.abc import Iterator

import cuda_emulation
import pytest
import torch
from cuda_emulation import EmulationError, Emulator

import int8compile.ops  # noqa: F401 (defines the schemas)
from int8compile.ops._library import REFERENCES

REFERENCE = {op._schema.name.split("::")[1]: body for op, body in REFERENCES.items()}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CAPACITY = 128  # kGatherCapacity


def _has_sanitizer() -> bool:
    if shutil.which("g++") is None:
        return False
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=False).stdout
    return "/" in found


pytestmark = pytest.mark.skipif(not _has_sanitizer(), reason="needs g++ with AddressSanitizer")


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    emulator = Emulator(cuda_emulation.build())
    yield emulator
    emulator.close()


@pytest.fixture
def force(emulator: Emulator):
    """A function that makes every product use one kernel of plan.cpp's table, until the test ends."""
    yield lambda name: emulator.call("force_cuda_kernel", name)
    emulator.call("force_cuda_kernel", "auto")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def problem(m: int, n: int, k: int, dtype: torch.dtype, outliers: int = 0, seed: int = 0):
    """x [m, k] with outlier columns, weight [n, k], its scale and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).clamp(-5, 5)
    columns = torch.randperm(k, generator=generator)[:outliers]
    for i, column in enumerate(columns.tolist()):
        x[i % m, column] = 7.0 + i % 50
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    return x.to(dtype), weight, torch.rand(n, generator=generator) * 0.01, torch.randn(n, generator=generator).to(dtype)


def assert_close(got: torch.Tensor, want: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor):
    """Equal but for the order of the outlier product's sums, in which no element of x counts more than fully."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    size = torch.nan_to_num(x.double().abs() @ weight.double().abs().t() * scale, nan=0.0, posinf=0.0)
    bound = want.double().abs() * torch.finfo(got.dtype).eps * 1.01 + size * 1e-6 + 1e-30
    assert not (((got.double() - want.double()).abs() > bound) & want.isfinite()).any()


# Every kernel with sizes off its tile, its stages and its warps' shares; outliers within one list, at its end, in the
# next list and past what is gathered.
CASES = [
    ("fused", 1, 45, 1040, (0, 1, 64, 70)),
    ("fused", 7, 19, 528, (0, 3)),
    ("fused", 1, 5, 16384, (3,)),
    ("skinny", 1, 45, 64, (0, 2)),
    ("skinny", 8, 37, 2576, (0, 64, 130)),
    ("skinny", 5, 1, 16, (1,)),
    ("t16x64", 13, 70, 1552, (0, 5, 70)),
    ("t32x64", 27, 100, 656, (0, 64)),
    ("t64x64", 61, 67, 1168, (0, 17)),
    ("t64x64", 70, 67, 272, (0, 17, CAPACITY + 1)),
    ("t64x64", 61, 72, 1168, (0, 17, 3)),  # 8 columns at a time to the output
    ("t128x128", 131, 133, 208, (0, 1, CAPACITY + 70)),
    ("t128x128", 131, 136, 208, (3, 0, 1)),
    ("unaligned", 6, 30, 37, (0, 3)),
    ("unaligned", 65, 66, 301, (0, 16, CAPACITY + 3)),
]


@pytest.mark.parametrize(("kernel", "m", "n", "k", "outliers"), CASES, ids=lambda v: str(v).replace(" ", ""))
def test_products_match_the_reference(emulator, force, kernel, m, n, k, outliers):
    # Large tiles take a dtype in turn: their blocks are slow here.
    every = zip(outliers, DTYPES, strict=False) if "64x64" in kernel or "128" in kernel else None
    for i, (count, dtype) in enumerate(every or itertools.product(outliers, DTYPES)):
        x, weight, scale, bias = problem(m, n, k, dtype, count, seed=i)
        policy = "element" if i % 4 == 3 else "column"
        force(kernel)
        got = emulator.call("linear", x, weight, scale, bias, 6.0, policy, seed=i, multiprocessors=(2, 5, 40)[i % 3])
        want = REFERENCE["linear"](x, weight, scale, bias, 6.0, policy)
        if count == 0:
            assert same_bits(got, want), (dtype, count)
        assert_close(got, want, x, weight, scale)


@pytest.mark.parametrize(("m", "n", "k", "count"), [(1, 45, 64, 3), (13, 70, 176, 20), (6, 30, 37, 0), (3, 5, 7, 7)])
def test_columns_that_are_given_give_the_references_bits(emulator, m, n, k, count):
    for i, dtype in enumerate(DTYPES):
        x, weight, scale, bias = problem(m, n, k, dtype, count, seed=i)
        x[0, :2] = torch.tensor([0.0, float("nan") if i == 1 else 1e4])
        columns = torch.randperm(k, generator=torch.Generator().manual_seed(i))[:count].sort().values.to(torch.int32)
        bias = None if i == 2 else bias
        calibrated = (x, weight, scale, bias, 6.0, "calibrated", columns, weight[:, columns.long()].contiguous())
        for args in (calibrated, (x, weight, scale, bias, 6.0, "none")):
            assert same_bits(emulator.call("linear", *args, seed=i), REFERENCE["linear"](*args))


def test_weights_alone_in_int8(emulator):
    for i, (m, n, k) in enumerate(((1, 20, 64), (7, 33, 37), (70, 5, 528))):
        x, weight, scale, bias = problem(m, n, k, DTYPES[i % 3], 2)
        for offset in (bias, None):
            got = emulator.call("linear", x, weight, scale, offset, 6.0, "all")
            assert (got.shape, got.dtype) == ((m, n), x.dtype)
            double = x.double() @ (weight.double() * scale.double()[:, None]).t()
            double = double if offset is None else double + offset.double()
            assert torch.allclose(got.double(), double, rtol=torch.finfo(x.dtype).eps, atol=1e-4)


@pytest.mark.parametrize("kernel", ["skinny", "t16x64", "t64x64", "unaligned"])
def test_shared_activations_in_every_dtype(emulator, force, kernel):
    x, weight, scale, bias = problem(6, 40, 192, torch.bfloat16, 5)
    q, row_scale, outliers = REFERENCE["quantize_rowwise"](x, 6.0)
    apart = torch.zeros(193, dtype=torch.bool)[1:].copy_(outliers)  # flags that are not aligned
    force(kernel)
    for dtype, mask, offset in itertools.product(DTYPES, (outliers, apart, None), (None, bias.float(), bias.double())):
        args = (weight, scale, offset, dtype, 0.0)
        got = emulator.call("scaled_mm", q, row_scale, x, mask, *args)
        want = REFERENCE["scaled_mm"](q, row_scale, x, mask, *args)
        assert_close(got, want, x, weight, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_is_the_references_bits(emulator, dtype):
    info = torch.finfo(dtype)
    for m, k, threshold in ((1, 1, 6.0), (3, 333, 0.5), (2, 5000, 6.0), (130, 64, 0.0), (1, 40000, 2.0), (0, 8, 1.0)):
        for size in (1.0, info.max, info.max / 3, info.tiny, info.smallest_normal / 4, 2.0**-120, 2.0**-121):
            x = ((torch.rand(m, k) * 2 - 1) * size * (4 if size == 1 else 1)).to(dtype)
            if m and k > 3:
                x[m // 2, 2] = (float("nan"), float("inf"), -0.0, 6.0)[m % 4]
            got, want = emulator.call("quantize_rowwise", x, threshold), REFERENCE["quantize_rowwise"](x, threshold)
            assert all(same_bits(a, b) for a, b in zip(got, want, strict=True)), (m, k, threshold, size)


@pytest.mark.parametrize(
    ("m", "kernel"), [(3, "fused"), (3, "skinny"), (12, "t16x64"), (70, "t64x64"), (3, "unaligned")]
)
def test_nan_and_inf_stay_in_their_row(emulator, force, m, kernel):
    force(kernel)
    for i, (threshold, bad) in enumerate(itertools.product((0.0, 6.0), (float("nan"), float("inf"), float("-inf")))):
        x, weight, scale, bias = problem(m, 20, 64, DTYPES[i % 3], 2)
        x[1, 7] = bad
        for policy in ("column", "element"):
            got = emulator.call("linear", x, weight, scale, bias, threshold, policy)
            want = REFERENCE["linear"](x, weight, scale, bias, threshold, policy)
            assert not got[1].isfinite().any()
            assert_close(got, want, x, weight, scale)


def test_extreme_sums_are_exact(emulator, force):
    k = 131072
    for kernel, m, sign in (("skinny", 2, 1), ("t16x64", 1, -1)):
        force(kernel)
        q, weight = torch.full((m, k), 127 * sign, dtype=torch.int8), torch.full((3, k), 127, dtype=torch.int8)
        got = emulator.call(
            "scaled_mm", q, torch.ones(m), torch.zeros(m, k), None, weight, torch.ones(3), None, torch.float32
        )
        assert (got == float(sign * 127 * 127 * k)).all()


def test_empty_and_odd_shapes_and_layouts(emulator):
    for m, n, k in ((0, 7, 24), (5, 0, 24), (5, 7, 0), (0, 0, 0)):
        x, weight, scale, bias = problem(m, n, k, torch.bfloat16)
        assert torch.equal(emulator.call("linear", x, weight, scale, bias, 6.0), bias.expand(m, n))
    x = torch.randn(6, 5, 40).transpose(0, 1)[:, ::2]
    wide, scale = torch.randint(-127, 128, (30, 100), dtype=torch.int8), torch.rand(12)
    for weight in (wide[3:15, 7:47], wide[:12, :80:2], wide[:24:2, 60:], wide[:1, :40].expand(12, 40)):
        want = REFERENCE["linear"](x, weight, scale, None, 0.0)
        assert same_bits(emulator.call("linear", x, weight, scale, None, 0.0), want)
    assert emulator.call("linear", x[0, 0], wide[:12, :40], scale, None, 2.0).shape == (12,)
    # Wider than what one thread of the quantiser holds in registers, and a weight with rows further apart.
    x, weight, scale, bias = problem(2, 9, 8208, torch.bfloat16, 3)
    padded = torch.zeros(9, 8240, dtype=torch.int8)[:, :8208].copy_(weight)
    got = emulator.call("linear", x, padded, scale, bias, 6.0)
    assert_close(got, REFERENCE["linear"](x, weight, scale, bias, 6.0), x, weight, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_the_references(emulator, dtype):
    several_slices = [(1, 520000, 65)] if dtype == torch.float32 else []
    for m, n, k in ((3, 7, 100), (0, 4, 8), *several_slices):
        _, weight, scale, _ = problem(1, n, k, dtype)
        grad = torch.randn(2, m, n).to(dtype)
        got = emulator.call("input_gradient", grad, weight, scale, dtype)
        want = REFERENCE["input_gradient"](grad, weight, scale, dtype)
        assert got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2 * float(want.abs().max() if m else 0))


def test_results_do_not_depend_on_the_schedule(emulator, force):
    x, weight, scale, bias = problem(20, 70, 1300, torch.float32, 3)
    for kernel in ("t32x64", "t64x64", "unaligned"):
        force("auto" if x.shape[1] % 16 else kernel)
        outs = [emulator.call("linear", x, weight, scale, bias, 6.0, seed=seed) for seed in range(3)]
        assert all(torch.equal(outs[0], out) for out in outs)


def test_bad_arguments_are_named(emulator):
    x, weight, scale, _ = problem(2, 7, 24, torch.float32)
    for args, message in (
        ((torch.tensor(1.0), weight, scale, None, 6.0), "x is a scalar"),
        ((x.double(), weight, scale, None, 6.0), "x has dtype Double"),
        ((x, weight.float(), scale, None, 6.0), r"weight is Float \[7, 24\] on cpu; expected int8"),
        ((x[:, :7], weight, scale, None, 6.0), "so it takes 24 features, but x has 7"),
        ((x, weight, scale[:6], None, 6.0), r"weight_scale is Float \[6\] on cpu; expected Float \[7\] on cpu"),
        ((x, weight, scale, torch.ones(6), 6.0), r"bias is \[6\] on cpu; expected \[7\]"),
        ((x, weight, scale, None, -1.0), "threshold=-1; expected 0"),
        ((x, weight, scale, None, 6.0, "row"), "outlier_policy='row'; expected one of 'column', 'element', "),
    ):
        with pytest.raises(ValueError, match=message):
            emulator.call("linear", *args)


# A kernel, a problem that reaches every barrier and wait in it, and the ordinals of those that show nothing when they
# are left out: another barrier follows at once (as the codes' by the lists', the sums' by the next list's), the list's
# totals are those of the list before, or the first group of copies holds all weights.
MUTATIONS = [
    pytest.param("fused", 3, 50, 528, 20, [2], [1], marks=pytest.mark.slow),
    pytest.param("skinny", 3, 50, 2128, 150, [2, 3, 6, 9], [], marks=pytest.mark.slow),
    pytest.param("t32x64", 27, 70, 656, 20, [2], []),
    pytest.param("t128x128", 70, 140, 400, 20, [], [], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kernel", "m", "n", "k", "outliers", "barriers", "waits"), MUTATIONS)
def test_the_emulation_catches_missing_barriers_and_waits(emulator, force, kernel, m, n, k, outliers, barriers, waits):
    """Leaving out any one barrier, or any one wait for copies, shows: in the output, or in how the process ends."""
    force(kernel)
    x, weight, scale, bias = problem(m, n, k, torch.bfloat16, outliers)
    args = ("linear", x, weight, scale, bias, 6.0)
    right = emulator.call(*args)
    all_barriers, all_waits = emulator.counts()

    def shows(**left_out: int) -> bool:
        for seed in range(6):
            try:
                if not same_bits(emulator.call(*args, seed=seed, **left_out), right):
                    return True
            except EmulationError:
                force(kernel)
                return True
        return False

    missed = [i for i in range(all_barriers) if not shows(skip_barrier=i)]
    late = [i for i in range(all_waits) if not shows(skip_wait=i)]
    assert (missed, late) == (barriers, waits), (all_barriers, all_waits)


# A file, what stands in it, and the wrong index that takes its place.
WRONG = [
    pytest.param("gather.cu", "line * x.k + column", "line * x.k + column + 1"),
    pytest.param("gemm.cuh", "lane % 8 + lane / 16 * 8, step", "lane % 16, step", marks=pytest.mark.slow),
    pytest.param("gemm.cuh", "at >= k ? 0", "at > k ? 0", marks=pytest.mark.slow),
    pytest.param("skinny.cu", "  row += kRows;\n      step", "  row += 15;\n      step", marks=pytest.mark.slow),
    pytest.param("quantize.cu", "at = packs * size + thread", "at = packs * size + thread + 1"),
]


@pytest.mark.parametrize(("file", "right", "wrong"), WRONG)
def test_the_emulation_catches_wrong_indices(file, right, wrong):
    text = (cuda_emulation.SOURCES / file).read_text()
    emulator = Emulator(cuda_emulation.build({file: (text, text.replace(right, wrong))}))
    assert right in text

    def agrees(m: int, n: int, k: int) -> bool:
        x, weight, scale, bias = problem(m, n, k, torch.bfloat16, 3)
        try:
            got = emulator.call("linear", x, weight, scale, bias, 6.0)
            assert_close(got, REFERENCE["linear"](x, weight, scale, bias, 6.0), x, weight, scale)
        except (AssertionError, EmulationError):
            return False
        return True

    sizes = {"skinny.cu": (2, 70, 64), "quantize.cu": (70, 16, 301)}
    assert not agrees(*sizes.get(file, (70, 70, 272)))
    emulator.close()
