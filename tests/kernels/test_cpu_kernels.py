"""The native CPU kernels against the reference bodies, with every instruction set this CPU runs.

Codes, scales and outlier columns are equal to the bit; so are outputs where no outlier product takes part. That product
sums in another order, so it is held to a few fp32 roundings of its terms.
"""

import concurrent.futures
import itertools
import random

import pytest
import torch

import int8compile.ops  # noqa: F401 (defines the schemas)
from int8compile.limits import SMALLEST_THRESHOLD
from int8compile.native import loader
from int8compile.ops._library import REFERENCES

REFERENCE = {op._schema.name.split("::")[1]: body for op, body in REFERENCES.items()}
NATIVE = {name: getattr(torch.ops.int8compile, name).default for name in REFERENCE if name != "quantize_weight"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def isas() -> list[str]:
    loader.load("cpu")
    return torch.ops.int8compile_native.isas().split()


@pytest.fixture(params=["portable", "avx2", "avxvnni", "avx512vnni", "amx"])
def isa(request):
    """Each instruction set in turn; skipped where the CPU has it not."""
    if request.param not in isas():
        pytest.skip(f"this CPU has no {request.param}")
    torch.ops.int8compile_native.set_isa(request.param)
    threads = torch.get_num_threads()
    yield request.param
    torch.ops.int8compile_native.set_isa("auto")
    torch.set_num_threads(threads)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def codes(*shape: int, low: int = -127) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8)


class Case:
    """A random problem: sizes off every block and vector length, outliers, and rows that are hard to quantise."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        torch.manual_seed(seed)
        while True:
            self.m = rng.choice([0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 23, 25, 33, 64, 100, 130, 193, 200])
            self.n = rng.choice([0, 1, 2, 3, 5, 8, 15, 17, 31, 63, 64, 65, 100, 129, 300])
            self.k = rng.choice([0, 1, 3, 15, 16, 17, 31, 33, 64, 100, 576, 1025, 1361, 1377, 2721, 4100])
            if self.m * self.n * self.k <= 8_000_000:
                break
        self.dtype = rng.choice(DTYPES)
        self.threshold = rng.choice([0.0, 6.0, 6.0, 2.5, 0.001])
        self.policy = rng.choice(["column", "element"])
        self.kind = rng.choice(["plain", "plain", "extreme", "nan", "zero", "huge"])
        self.threads = rng.choice([1, 2, 3])
        self.weight, self.scale = codes(self.n, self.k), torch.rand(self.n) * 0.01 + 1e-4
        self.x = self._activation(rng).to(self.dtype)
        self.bias = rng.choice([None, torch.randn(self.n), torch.randn(self.n).to(self.dtype)])

    def _activation(self, rng: random.Random) -> torch.Tensor:
        m, k = self.m, self.k
        x = torch.randn(m, k)
        outliers = rng.choice([0, 0, 1, 4, 9, 70])
        if outliers and k:
            columns = torch.randperm(k)[:outliers]
            x[:, columns] *= torch.rand(len(columns)) * 30 + 8
        if self.kind == "extreme":
            self.weight = torch.full_like(self.weight, rng.choice([127, -127]))
            return torch.full((m, k), 3.0)
        if self.kind == "nan" and m and k:
            for bad in (float("nan"), float("inf"), -float("inf")):
                x[rng.randrange(m), rng.randrange(k)] = bad
        if self.kind == "zero" and m:
            x[rng.randrange(m)] = 0
            x[rng.randrange(m)] *= 1e-38
        if self.kind == "huge":
            x = x * (1e33 if self.dtype != torch.float16 else 1e3)
        return x

    def __str__(self) -> str:
        return (
            f"{self.m}x{self.k}x{self.n} {self.dtype} threshold={self.threshold} {self.policy} {self.kind} "
            f"threads={self.threads}"
        )

    def check(self) -> None:
        torch.set_num_threads(self.threads)
        quantized = [ops["quantize_rowwise"](self.x, self.threshold) for ops in (REFERENCE, NATIVE)]
        assert all(same_bits(a, b) for a, b in zip(*quantized, strict=True))
        q, row_scale, outliers = quantized[0]
        args = (self.weight, self.scale, self.bias)
        size = self._terms(q, row_scale, outliers)
        want, got = (ops["linear"](self.x, *args, self.threshold, self.policy) for ops in (REFERENCE, NATIVE))
        self._close(got, want, size, exact=not outliers.any())
        residual_from = self.threshold if self.policy == "element" else 0.0
        mask = None if self.threshold == 0 else outliers
        for out_dtype in DTYPES:
            rest = (q, row_scale, self.x, mask, *args, out_dtype, residual_from)
            want, got = (ops["scaled_mm"](*rest) for ops in (REFERENCE, NATIVE))
            self._close(got, want, size, exact=not outliers.any())

    def _terms(self, q: torch.Tensor, row_scale: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
        """What the magnitudes of each output's terms add up to: roundings are relative to that."""
        residual = torch.where(outliers, self.x.double() - row_scale[:, None].double() * q.double(), 0.0)
        product = row_scale[:, None].double() * (q.double() @ self.weight.double().t()).abs()
        size = (residual.abs() @ self.weight.double().abs().t() + product) * self.scale
        return torch.nan_to_num(size, nan=0.0, posinf=1e300)

    @staticmethod
    def _close(got: torch.Tensor, want: torch.Tensor, size: torch.Tensor, exact: bool) -> None:
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        if exact:
            assert same_bits(got, want)
            return
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.isinf(), want.isinf())
        info = torch.finfo(got.dtype)
        bound = want.double().abs() * info.eps * 1.01 + size * 2e-6 + info.tiny * 2e-3
        assert not (((got.double() - want.double()).abs() > bound) & want.isfinite()).any()


def test_no_instruction_set_is_rejected():
    assert isas()[-1] == "portable"
    assert torch.ops.int8compile_native.rejected() == ""


@pytest.mark.parametrize("seed", range(8))
def test_random_problems(isa, seed):
    for i in range(10):
        case = Case(100 * seed + i)
        try:
            case.check()
        except AssertionError as error:
            raise AssertionError(f"{isa} {case}") from error


def test_results_do_not_depend_on_threads_or_on_other_rows(isa):
    for (m, n, k), dtype in itertools.product([(1, 4096, 577), (7, 333, 4100), (130, 640, 1025)], DTYPES):
        x = torch.randn(m, k)
        x[:, ::97] *= 20
        x, args = x.to(dtype), (codes(n, k), torch.rand(n), torch.randn(n))
        outs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(NATIVE["linear"](x, *args, 6.0))
        assert all(torch.equal(outs[0], out) for out in outs)
        alone = torch.cat([NATIVE["linear"](row, *args, 0.0) for row in x.split(1)])
        assert torch.equal(alone, NATIVE["linear"](x, *args, 0.0))


@pytest.fixture
def forced():
    """Let one kernel multiply."""
    yield torch.ops.int8compile_native.force_cpu_kernel
    torch.ops.int8compile_native.force_cpu_kernel("auto")


def test_which_kernel_multiplies_changes_no_bit(isa, forced):
    names = torch.ops.int8compile_native.cpu_kernels().split()
    for m, n, k in (
        (1, 1, 1),
        (3, 17, 63),
        (5, 33, 64),
        (16, 100, 577),
        (131, 69, 531),
        (200, 50, 1025),
        (7, 333, 4100),
    ):
        x, args = torch.randn(m, k), (codes(n, k, low=-128), torch.rand(n), torch.randn(n))
        x[:, ::97] *= 20
        forced("auto")
        want = NATIVE["linear"](x, *args, 6.0)
        for name in names:
            if name == "amx" and k < 64:
                continue
            for threads in (1, 3):
                forced(name)
                torch.set_num_threads(threads)
                assert torch.equal(NATIVE["linear"](x, *args, 6.0), want), (name, m, n, k, threads)


def test_a_forced_kernel_that_cannot_multiply_is_named(isa, forced):
    missing = next(name for name in ("widened", "panel") if name not in torch.ops.int8compile_native.cpu_kernels())
    forced(missing)
    with pytest.raises(ValueError, match=rf"kernel '{missing}' was asked for, which cannot multiply \[3, 8\].*{isa}"):
        NATIVE["linear"](torch.randn(3, 8), codes(4, 8), torch.rand(4), None, 0.0)
    with pytest.raises(ValueError, match="no kernel for CPUs is named 'fastest'"):
        forced("fastest")


def test_weights_alone_in_int8(isa):
    """Within fp32's roundings of float64, and to the bit the same for a row alone, in any batch, by any threads."""
    for (m, n, k), dtype in itertools.product(
        [(1, 300, 576), (2, 17, 1040), (7, 130, 33), (50, 97, 2064), (101, 16, 1), (5, 33, 6160)], DTYPES
    ):
        x, weight, scale, bias = torch.randn(m, k).to(dtype), codes(n, k, low=-128), torch.rand(n), torch.randn(n)
        outs = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            outs.append(NATIVE["linear"](x, weight, scale, bias, 0.0, "all"))
        assert all(torch.equal(outs[0], out) for out in outs)
        for size in (1, 3, 13):
            parts = [NATIVE["linear"](part, weight, scale, bias, 0.0, "all") for part in x.split(size)]
            assert torch.equal(torch.cat(parts), outs[0])
        want = x.double() @ weight.double().t() * scale.double() + bias.double()
        terms = x.double().abs() @ weight.double().abs().t() * scale.double() + bias.double().abs()
        error = (outs[0].double() - want).abs()
        assert (error <= want.abs() * torch.finfo(dtype).eps + terms * k**0.5 * 2.0**-22).all(), (m, n, k, dtype)


def test_quantize_at_the_ends_of_each_dtype(isa):
    for dtype in DTYPES:
        info = torch.finfo(dtype)
        for size in (info.max, info.max / 3, info.tiny, info.tiny * 5, info.smallest_normal / 4, 2.0**-120, 2.0**-121):
            x = ((torch.rand(9, 333) * 2 - 1) * size).to(dtype)
            x[:, 7] = size
            for threshold in (0.0, 6.0, max(size / 2, SMALLEST_THRESHOLD)):
                pairs = zip(*(ops["quantize_rowwise"](x, threshold) for ops in (REFERENCE, NATIVE)), strict=True)
                assert all(same_bits(a, b) for a, b in pairs), (dtype, size, threshold)


def test_every_16_bit_float_is_read_and_written_right(isa):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    eye, ones, flags = torch.eye(256, dtype=torch.int8), torch.ones(256), torch.ones(256, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype).reshape(256, 256)
        x = x[x.isfinite().all(dim=1)]
        args = (torch.zeros(x.shape, dtype=torch.int8), torch.ones(len(x)), x, flags, eye, ones, None)
        for out_dtype in DTYPES:
            want, got = (ops["scaled_mm"](*args, out_dtype) for ops in (REFERENCE, NATIVE))
            assert same_bits(want, got)


def test_sums_at_the_limit_of_int32(isa):
    k = 131072
    for a, b in ((127, 127), (-127, 127)):
        q, weight = torch.full((3, k), a, dtype=torch.int8), torch.full((5, k), b, dtype=torch.int8)
        args = (q, torch.ones(3), torch.zeros(3, k), None, weight, torch.ones(5), None, torch.float32)
        assert (NATIVE["scaled_mm"](*args) == float(a * b * k)).all()
    for m, k in itertools.product((1, 2, 30), (256, 773)):
        q, weight = codes(m, k, low=-128), codes(70, k, low=-128)
        args = (q, torch.ones(m), torch.zeros(m, k), None, weight, torch.ones(70), None, torch.float32)
        assert torch.equal(NATIVE["scaled_mm"](*args), (q.long() @ weight.long().t()).float())


def test_layouts(isa):
    x = torch.randn(6, 5, 40).transpose(0, 1)[:, ::2]
    keep, wide, scale = x.clone(), codes(30, 100), torch.rand(12)
    for weight in (wide[3:15, 7:47], wide[:12, :80:2], wide[:24:2, 60:]):
        want, got = (ops["linear"](x, weight, scale, None, 0.0) for ops in (REFERENCE, NATIVE))
        assert torch.equal(want, got)
        want, got = (ops["linear"](x, weight, scale, None, 0.0, "all") for ops in (REFERENCE, NATIVE))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    assert NATIVE["linear"](x[0, 0], wide[:12, :40], scale, None, 2.0).shape == (12,)
    assert torch.equal(x, keep)


def test_several_callers_at_once(isa):
    x, args = torch.randn(40, 600), (codes(200, 600), torch.rand(200), None, 2.0)
    want = NATIVE["linear"](x, *args)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = [pool.submit(NATIVE["linear"], x, *args) for _ in range(40)]
    assert all(torch.equal(want, result.result()) for result in results)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, s: NATIVE["linear"](torch.tensor(1.0), w, s, None, 0.0),
        lambda x, w, s: NATIVE["linear"](x.double(), w, s, None, 0.0),
        lambda x, w, s: NATIVE["linear"](x, w, s, None, -1.0),
        lambda x, w, s: NATIVE["linear"](x, w, s, None, 1.0, "rows"),
        lambda x, w, s: NATIVE["linear"](x, w.float(), s, None, 0.0),
        lambda x, w, s: NATIVE["linear"](x[:, :7], w, s, None, 0.0),
        lambda x, w, s: NATIVE["linear"](x, w, s.half(), None, 0.0),
        lambda x, w, s: NATIVE["linear"](x, w, s, torch.rand(5), 0.0),
        lambda x, w, s: NATIVE["quantize_rowwise"](x.int(), 0.0),
        lambda x, w, s: NATIVE["scaled_mm"](w, s, x, None, w, s, None, torch.float32),
        lambda x, w, s: NATIVE["scaled_mm"](w[:3], s[:3], x, None, w, s, None, torch.float64),
        lambda x, w, s: torch.ops.int8compile_native.set_isa("neon"),
    ],
)
def test_bad_arguments_are_named(call):
    isas()
    with pytest.raises(ValueError, match="int8compile"):
        call(torch.randn(3, 8), codes(4, 8), torch.rand(4))
