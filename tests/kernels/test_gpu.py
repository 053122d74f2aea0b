"""The CUDA kernels on a real GPU: every one against float64, in CUDA graphs, on streams, under compute-sanitizer.

Without a GPU all is skipped but the same checks of the CPU's kernels, at small sizes: they show that the checks
themselves work. ``python -m benchmarks.gpu`` runs this file class by class before it takes times.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys

import gold
import gpu
import pytest
import torch
from checkout import ROOT
from gpu import CAPACITY, KERNELS, THRESHOLD, forced, linear, problem

from int8compile.backend import int8
from int8compile.ops._library import REFERENCES

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: of the output's largest magnitude: one rounding of the output, and of the residuals in outlier columns
EPSILON = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2e-5}
COUNTS = (0, 1, 64, CAPACITY + 1)  # of outlier columns


@pytest.fixture(scope="module", autouse=True)
def _loaded() -> None:
    gpu.load("cuda" if torch.cuda.is_available() else "cpu")


def wrong(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> str:
    """What is wrong with an output; empty if nothing is. Rows that are not finite have to be so in both."""
    if got.shape != want.shape or got.dtype != dtype:
        return f"{got.dtype} {list(got.shape)} instead of {dtype} {list(want.shape)}"
    good = want.isfinite().all(dim=1)
    if bool(got[good].isfinite().all().logical_not()) or bool(got[~good].isfinite().any()):
        return "NaN or Inf where they do not belong, or not where they do"
    size = want[good].abs().amax(dim=1, keepdim=True) if bool(good.any()) else want[good]
    excess = ((got[good].double() - want[good]).abs() / (size * EPSILON[dtype] + 1e-30)).flatten()
    worst = float(excess.max()) if excess.numel() else 0.0
    return f"{worst:.2f} times the error that rounding explains" if worst > 1 else ""


def reference_rows(x: torch.Tensor) -> gold.Rows:
    """Of the reference body on the CPU, so that no kernel takes part."""
    quantize = REFERENCES[torch.ops.int8compile.quantize_rowwise.default]
    return gold.Rows(*(t.to(x.device) for t in quantize(x.cpu(), THRESHOLD)))


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.dtype == want.dtype and bool(((got == want) | (got.isnan() & want.isnan())).all())


def check(
    device: str, kernel: str, m: int, n: int, k: int, dtype: torch.dtype, count: int, policy: str, seed: int
) -> None:
    """A product against the gold, and its activation's codes, scales and columns to the bit."""
    x, weight, scale, bias = problem(device, m, n, k, dtype, count, seed=seed)
    if seed % 5 == 4 and m > 2:
        x[m // 2, k // 2] = (float("nan"), float("inf"))[seed % 2]
    label = f"{kernel} M={m} N={n} K={k} {dtype} outliers={count} {policy} seed={seed}"
    with forced(kernel):
        got = linear(x, weight, scale, bias, THRESHOLD, policy)
    rows = reference_rows(x)
    for name, ours, want in zip(rows._fields, torch.ops.int8compile.quantize_rowwise(x, THRESHOLD), rows, strict=True):
        assert same_bits(ours, want), f"{label}: {name} are not the reference's bits"
    problem_found = wrong(got, gold.linear(x, weight, scale, bias, THRESHOLD, policy, rows=rows), dtype)
    assert not problem_found, f"{label}: {problem_found}"


class TestResults:
    @pytest.mark.parametrize(
        ("device", "m"),
        [("cpu", m) for m in (1, 2, 9)]
        + [pytest.param("cuda", m, marks=needs_gpu) for m in (1, 2, 7, 8, 9, 17, 64, 100, 512, 4096)],
    )
    def test_products_are_the_gold(self, device, m):
        """Of the kernel that is chosen: every dtype and number of outlier columns, with NaN and Inf in some."""
        sizes = ((48, 64), (33, 57)) if device == "cpu" else ((768, 1040), (335, 577))
        for seed, ((n, k), count, dtype) in enumerate(itertools.product(sizes, COUNTS, DTYPES)):
            check(device, "auto", m, n, k, dtype, count, "element" if m % 2 == 0 and count == 1 else "column", seed)

    @needs_gpu
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_every_kernel_is_the_gold(self, kernel):
        if kernel not in gpu.kernels("cuda"):
            pytest.skip("no wgmma kernel was proven on this GPU")
        checked = 0
        for seed, ((m, n, k), dtype, count) in enumerate(
            itertools.product(((3, 200, 1040), (70, 136, 272), (300, 520, 4112)), DTYPES, (0, 5, CAPACITY + 1))
        ):
            try:
                check("cuda", kernel, m, n, k, dtype, count, "column", seed)
                checked += 1
            except gpu.NotApplicableError:
                continue
        assert checked

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("device", DEVICES)
    def test_gradients_are_the_golds(self, device, dtype):
        x, weight, scale, _ = problem(device, 33, 96, 208, dtype, 3)
        out = linear(x.requires_grad_(), weight, scale, None, THRESHOLD, "column")
        grad = torch.randn_like(out)
        out.backward(grad)
        want = grad.double() @ (weight.double() * scale.double()[:, None])
        assert wrong(x.grad, want, dtype) == ""

    def test_a_wrong_output_is_seen(self):
        for dtype in DTYPES:
            x, weight, scale, bias = problem("cpu", 5, 24, 64, dtype, 3)
            out = linear(x, weight, scale, bias, THRESHOLD, "column")
            want = gold.linear(x, weight, scale, bias, THRESHOLD, rows=reference_rows(x))
            assert wrong(out, want, dtype) == ""
            off = out.clone()
            off[2, 3] += 0.1 * out.abs().max()
            assert "times the error" in wrong(off, want, dtype)
            off[2, 3] = float("nan")
            assert "NaN" in wrong(off, want, dtype)
            assert "instead of" in wrong(out[:1], want, dtype)
            assert wrong(out, torch.where(want == want[1, 1], float("nan"), want), dtype)


@needs_gpu
class TestGraphs:
    @pytest.mark.parametrize(
        ("m", "n", "k"), [(1, 512, 1024), (8, 512, 4096), (40, 512, 1024), (200, 512, 1040), (6, 65, 100)]
    )
    def test_replays_meet_other_outliers(self, m, n, k):
        """Captured with one outlier column; replayed with others, with none, and with more than are gathered."""
        inputs = [problem("cuda", m, n, k, torch.bfloat16, count, seed=count)[0] for count in COUNTS]
        _, *rest = problem("cuda", m, n, k, torch.bfloat16, seed=7)
        static = inputs[1].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            linear(static, *rest, THRESHOLD, "column")
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(static, *rest, THRESHOLD, "column")
        for x in [*inputs, *reversed(inputs)]:
            static.copy_(x)
            graph.replay()
            assert torch.equal(out, linear(x, *rest, THRESHOLD, "column"))

    def test_reduce_overhead_changes_nothing(self):
        model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 512))
        model = model.cuda().bfloat16().eval().requires_grad_(False)
        # Not by its name, which needs an installed package.
        compiled = torch.compile(model, backend=int8, mode="reduce-overhead")
        plain = torch.compile(model, backend=int8)
        with torch.inference_mode():
            for i in range(6):
                x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
                x[:, i : 3 * i] = 30.0
                assert torch.equal(compiled(x).clone(), plain(x)), f"call {i}"


@needs_gpu
class TestStreams:
    SIZES = ((1, 2048, 4096), (40, 2048, 2048), (200, 1024, 2048))

    def test_streams_do_not_disturb_one_another(self):
        problems = [problem("cuda", m, n, k, torch.bfloat16, 3 * i, seed=i) for i, (m, n, k) in enumerate(self.SIZES)]
        want = [linear(*p, THRESHOLD, "column") for p in problems]
        pool = [torch.cuda.Stream() for _ in problems]
        torch.cuda.synchronize()
        outs: list[list[torch.Tensor]] = [[] for _ in problems]
        for _ in range(100):
            for i, stream in enumerate(pool):
                with torch.cuda.stream(stream):
                    outs[i].append(linear(*problems[i], THRESHOLD, "column"))
        torch.cuda.synchronize()
        for size, several, expected in zip(self.SIZES, outs, want, strict=True):
            assert all(torch.equal(out, expected) for out in several), size

    def test_every_gpu_gives_the_same(self):
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        args = problem("cuda", *self.SIZES[1], torch.bfloat16, 3, seed=1)
        want = linear(*args, THRESHOLD, "column").cpu()
        for index in range(1, torch.cuda.device_count()):
            there = [t.to(f"cuda:{index}") for t in args]
            assert torch.equal(linear(*there, THRESHOLD, "column").cpu(), want), index


def is_clean(said: str) -> bool:
    """Whether compute-sanitizer ended with a summary, and all summaries say that nothing was found."""
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    return bool(summaries) and all(re.match(r"0 (errors|hazards)", text) for text in summaries)


class TestSanitizer:
    @needs_gpu
    @pytest.mark.parametrize("check", ["memcheck", "racecheck"])
    def test_finds_nothing_in_any_kernel(self, check):
        from torch.utils import cpp_extension

        name = "compute-sanitizer"
        tool = shutil.which(name) or shutil.which(name, path=f"{cpp_extension.CUDA_HOME}/bin")
        if tool is None:
            pytest.skip("compute-sanitizer was not found")
        # Each tensor an allocation of its own, so that reading past one shows.
        here = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        here["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
        command = [tool, "--tool", check, "--error-exitcode", "7", sys.executable, gpu.__file__]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=here)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said[-4000:]
        assert is_clean(said), said[-4000:]

    @pytest.mark.parametrize(
        ("said", "clean"),
        [
            ("== ERROR SUMMARY: 0 errors", True),
            ("== ERROR SUMMARY: 10 errors", False),
            ("== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
            ("== RACECHECK SUMMARY: 10 hazards displayed (0 errors, 10 warnings)", False),
            ("", False),
        ],
    )
    def test_its_summary_is_understood(self, said, clean):
        assert is_clean(said) == clean
