"""The checks of ``benchmarks.gpu``: the build, results against float64, CUDA graphs, streams, compute-sanitizer."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common

THRESHOLD = 6.0
CAPACITY = 128  # kGatherCapacity of csrc/cuda/kernels.h
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: of the output's largest magnitude: one rounding of the output, and of the residuals in outlier columns
EPSILON = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float32: 2e-5}
KERNELS = ("fused", "skinny", "t16x64", "t32x64", "t64x64", "t128x128", "unaligned", "wgmma128", "wgmma256")


@dataclasses.dataclass(frozen=True)
class Run:
    """Where results go, whether this is a rehearsal on a CPU, and when to end (``time.monotonic()``)."""

    out: Path
    dry_run: bool
    deadline: float

    @property
    def device(self) -> str:
        return "cpu" if self.dry_run else "cuda"

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def save(self, name: str, result: Any) -> None:
        """Keep what there is so far of a section."""
        (self.out / f"{name}.json").write_text(json.dumps(result))

    def synchronize(self) -> None:
        if not self.dry_run:
            torch.cuda.synchronize()


def linear(*args: Any) -> torch.Tensor:
    out: torch.Tensor = torch.ops.int8compile.linear(*args)
    return out


def load(run: Run) -> None:
    """Register the operators, and the native kernels of the device (on a CPU the reference does)."""
    import int8compile.ops  # noqa: F401
    from int8compile.native import loader

    if not run.dry_run:
        loader.load("cuda")


def build(run: Run) -> dict[str, Any]:
    """The library, built or found, and the machine."""
    from int8compile.native import loader

    started = time.perf_counter()
    load(run)
    if not run.dry_run:
        loader.load("common")  # which compiled models need too: built here, and not in the time of what comes later
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "machine": common.machine(run.device)}
    if not run.dry_run:
        library = loader.library_path("cuda")
        verdicts = {path.name: path.read_text() or "proven" for path in library.parent.glob("wgmma-*")}
        found |= {"library": str(library), "wgmma": verdicts, "capability": torch.cuda.get_device_capability()}
    return found


def problem(
    run: Run, m: int, n: int, k: int, dtype: torch.dtype, outliers: int = 0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [m, k], an int8 weight [n, k], its scale and a bias; ``outliers`` columns of x reach the threshold."""
    with torch.device(run.device):  # a CPU would need most of a section's time for the large ones
        generator = torch.Generator(run.device).manual_seed(seed)
        x = torch.randn(m, k, generator=generator).clamp(-5.5, 5.5)
        columns = torch.randperm(k, generator=generator)[: min(outliers, k)]
        x[:, columns] *= 0.5
        x[torch.arange(len(columns)) % max(m, 1), columns] = 20.0
        weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale, bias = torch.rand(n, generator=generator) * 0.01 + 1e-4, torch.randn(n, generator=generator)
    return x.to(dtype), weight, scale, bias.to(dtype)


def gold(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, policy: str) -> torch.Tensor:
    """LLM.int8() in float64, from the reference's own codes (made on the CPU, so no kernel of ours takes part)."""
    from int8compile.ops._library import REFERENCES

    quantize = REFERENCES[torch.ops.int8compile.quantize_rowwise.default]
    codes, row_scale, flags = (t.to(x.device) for t in quantize(x.cpu(), THRESHOLD))
    exact = flags.expand(x.shape) if policy == "column" else x.abs() >= THRESHOLD
    rows = torch.where(exact & flags, x.double(), codes.double() * row_scale.double()[:, None])
    return rows @ weight.double().t() * scale.double() + bias.double()


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


def cases(run: Run) -> Iterator[tuple[str, int, int, int, torch.dtype, int, str]]:
    """(kernel or auto, M, N, K, dtype, outlier columns, policy)."""
    rows = (1, 2, 9) if run.dry_run else (1, 2, 7, 8, 9, 17, 64, 100, 512, 4096)
    sizes = ((48, 64), (33, 57)) if run.dry_run else ((768, 1040), (335, 577))
    for m, (n, k), count in itertools.product(rows, sizes, (0, 1, 64, CAPACITY + 1)):
        for dtype in DTYPES:
            yield "auto", m, n, k, dtype, count, "element" if m % 2 == 0 and count == 1 else "column"
    if run.dry_run:
        return
    kernels = [kernel for kernel in KERNELS if not kernel.startswith("wgmma") or wgmma_is_used(run)]
    for kernel, (m, n, k) in itertools.product(kernels, ((3, 200, 1040), (70, 136, 272), (300, 520, 4112))):
        for dtype, count in itertools.product(DTYPES, (0, 5, CAPACITY + 1)):
            yield kernel, m, n, k, dtype, count, "column"


def correctness(run: Run) -> dict[str, Any]:
    """Every case against float64, once more with NaN and Inf in a row; codes, scales and columns to the bit."""
    load(run)
    result: dict[str, Any] = {"checked": 0, "not_applicable": 0, "failures": [], "complete": False}
    result["wgmma"] = wgmma_is_used(run)
    for i, (kernel, m, n, k, dtype, count, policy) in enumerate(cases(run)):
        if run.left() < 5:
            return result
        x, weight, scale, bias = problem(run, m, n, k, dtype, count, seed=i)
        if i % 5 == 4 and m > 2:
            x[m // 2, k // 2] = (float("nan"), float("inf"))[i % 2]
        label = f"{kernel} M={m} N={n} K={k} {dtype} outliers={count} {policy}"
        try:
            with forced(run, kernel):
                got = linear(x, weight, scale, bias, THRESHOLD, policy)
        except (RuntimeError, ValueError) as error:
            if "was asked for, which cannot" not in str(error):
                raise
            result["not_applicable"] += 1
            continue
        problems = [wrong(got, gold(x, weight, scale, bias, policy), dtype), _wrong_codes(x)]
        result["failures"] += [f"{label}: {text}" for text in problems if text]
        result["checked"] += 1
        if i % 20 == 0:
            run.save("correctness", result)
    result["failures"] += _wrong_gradients(run)
    result["complete"] = True
    return result


def wgmma_is_used(run: Run) -> bool:
    """Whether wgmma kernels were proven here. One that was not may hang, so nothing else may force it either."""
    if run.dry_run or torch.cuda.get_device_capability() != (9, 0):
        return False
    return str(torch.ops.int8compile_native.cuda_kernel(4096, 4096, 4096, 90, 132, False)).startswith("wgmma")


class forced:  # noqa: N801 (reads as the statement it is)
    """Makes every product use one kernel."""

    def __init__(self, run: Run, kernel: str) -> None:
        self.set = None if run.dry_run else torch.ops.int8compile_native.force_cuda_kernel
        self.kernel = kernel

    def __enter__(self) -> None:
        if self.set is not None:
            self.set(self.kernel)

    def __exit__(self, *error: object) -> None:
        if self.set is not None:
            self.set("auto")


def _wrong_codes(x: torch.Tensor) -> str:
    from int8compile.ops._library import REFERENCES

    op = torch.ops.int8compile.quantize_rowwise.default
    for name, got, want in zip(
        ("codes", "scales", "columns"), op(x, THRESHOLD), REFERENCES[op](x.cpu(), THRESHOLD), strict=True
    ):
        got = got.cpu()
        if not bool(((got == want) | (got.isnan() & want.isnan())).all()):
            return f"{name} are not the reference's bits"
    return ""


def _wrong_gradients(run: Run) -> list[str]:
    found = []
    for dtype in DTYPES:
        x, weight, scale, _ = problem(run, 33, 96, 208, dtype, 3)
        leaf = x.requires_grad_()
        out = linear(leaf, weight, scale, None, THRESHOLD, "column")
        grad = torch.randn_like(out)
        out.backward(grad)
        want = grad.double() @ (weight.double() * scale.double()[:, None])
        problem_found = "no gradient" if leaf.grad is None else wrong(leaf.grad, want, dtype)
        found += [f"gradient {dtype}: {problem_found}"] if problem_found else []
    return found


def graphs(run: Run) -> dict[str, Any]:
    """CUDA graphs, by hand and by ``mode="reduce-overhead"``, replayed with outliers in other columns, and in more."""
    if run.dry_run:
        return {"skipped": "CUDA graphs need a GPU"}
    load(run)
    failures: list[str] = []
    for m, n, k in ((1, 512, 1024), (8, 512, 4096), (40, 512, 1024), (200, 512, 1040), (6, 65, 100)):
        inputs = [problem(run, m, n, k, torch.bfloat16, count, seed=count)[0] for count in (0, 1, 64, CAPACITY + 1)]
        _, *rest = problem(run, m, n, k, torch.bfloat16, seed=7)
        static = inputs[1].clone()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            linear(static, *rest, THRESHOLD, "column")
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(static, *rest, THRESHOLD, "column")
        for i, x in enumerate([*inputs, *reversed(inputs)]):
            static.copy_(x)
            graph.replay()
            if not torch.equal(out, linear(x, *rest, THRESHOLD, "column")):
                failures.append(f"M={m} N={n} K={k}: replay {i} differs from the eager call")
    run.save("graphs", {"failures": failures, "complete": False})
    failures += _compiled_failures()
    return {"failures": failures, "complete": True}


def _compiled_failures() -> list[str]:
    model = torch.nn.Sequential(torch.nn.Linear(512, 1024), torch.nn.SiLU(), torch.nn.Linear(1024, 512))
    model = model.cuda().bfloat16().eval().requires_grad_(False)
    from int8compile.backend import int8  # its name needs an installed package

    compiled = torch.compile(model, backend=int8, mode="reduce-overhead")
    plain = torch.compile(model, backend=int8)
    failures = []
    with torch.inference_mode():
        for i in range(6):
            x = torch.randn(8, 512, device="cuda", dtype=torch.bfloat16)
            x[:, i : 3 * i] = 30.0
            if not torch.equal(compiled(x).clone(), plain(x)):
                failures.append(f"reduce-overhead: call {i} differs from the one without CUDA graphs")
    return failures


def streams(run: Run) -> dict[str, Any]:
    """The same linears on several streams at once, and on every GPU."""
    if run.dry_run:
        return {"skipped": "streams need a GPU"}
    load(run)
    failures = []
    sizes = ((1, 2048, 4096), (40, 2048, 2048), (200, 1024, 2048))
    problems = [problem(run, m, n, k, torch.bfloat16, 3 * i, seed=i) for i, (m, n, k) in enumerate(sizes)]
    want = [linear(*p, THRESHOLD, "column") for p in problems]
    pool = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    outs: list[list[torch.Tensor]] = [[] for _ in problems]
    for _ in range(100):
        for i, stream in enumerate(pool):
            with torch.cuda.stream(stream):
                outs[i].append(linear(*problems[i], THRESHOLD, "column"))
    torch.cuda.synchronize()
    for i, several in enumerate(outs):
        if not all(torch.equal(out, want[i]) for out in several):
            failures.append(f"{sizes[i]}: results differ between streams that run at once")
    for index in range(1, torch.cuda.device_count()):
        there = [t.to(f"cuda:{index}") for t in problems[1]]
        if not torch.equal(linear(*there, THRESHOLD, "column").cpu(), want[1].cpu()):
            failures.append(f"GPU {index} gives another result than GPU 0")
    return {"failures": failures, "gpus": torch.cuda.device_count()}


def sanitizer(run: Run) -> dict[str, Any]:
    """compute-sanitizer's memcheck and racecheck over every kernel at small sizes."""
    if run.dry_run:
        return {"skipped": "compute-sanitizer needs a GPU"}
    from torch.utils import cpp_extension

    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{cpp_extension.CUDA_HOME}/bin")
    if tool is None:
        return {"skipped": "compute-sanitizer was not found"}
    found: dict[str, Any] = {}
    for check in ("memcheck", "racecheck"):
        seconds = min(run.left() - 3, 45)
        if seconds < 10:
            found[check] = "left out: no time"
            continue
        command = [tool, "--tool", check, "--error-exitcode", "7", sys.executable, "-m", "benchmarks.gpu"]
        # Each tensor an allocation of its own, so that reading past one shows.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            done = subprocess.run(
                [*command, "--section", "sanitized", "--out", str(run.out)],
                capture_output=True, text=True, timeout=seconds, check=False, env=environment,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            found[check] = "took too long"
            continue
        lines = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", done.stdout + done.stderr)
        died = done.returncode not in (0, 7)  # 7: the tool has found something, and its summary says how much
        found[check] = f"exit code {done.returncode}: {done.stderr[-500:]}" if died or not lines else lines[-1]
        if done.returncode:
            found[f"{check}_output"] = done.stdout[-4000:]
        run.save("sanitizer", found)
    return found


def sanitized(run: Run) -> dict[str, Any]:
    """What compute-sanitizer watches: every kernel once or twice."""
    load(run)
    for kernel, m, n, k, count in (
        ("fused", 2, 40, 160, 3),
        ("skinny", 5, 40, 1040, 70),
        ("t16x64", 9, 70, 528, 3),
        ("t64x64", 70, 70, 272, CAPACITY + 1),
        ("t128x128", 130, 140, 272, 5),
        ("unaligned", 6, 33, 57, 3),
        ("wgmma128", 130, 136, 272, 5),
        ("wgmma256", 130, 264, 272, CAPACITY + 1),
    ):
        if kernel.startswith("wgmma") and not wgmma_is_used(run):
            continue
        x, *rest = problem(run, m, n, k, torch.bfloat16, count)
        with forced(run, kernel):
            linear(x, *rest, THRESHOLD, "column")
    run.synchronize()
    return {"ran": True}
