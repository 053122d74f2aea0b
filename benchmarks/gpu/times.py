"""Times of one linear for ``benchmarks.gpu``: ours in every form, bf16, and the peers.

A time is the median over replays of a CUDA graph that goes round copies of the weight which together are twice as large
as the L2 cache, so that decoding reads weights from memory as it does in a model.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.checks import THRESHOLD, Run, forced, linear, load, problem, wgmma_is_used

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 28672))  # K, N
ROWS = (1, 8, 64, 512, 4096)
#: microseconds that a replay should take at least, and how many replays a median is of
SAMPLE_US, SAMPLES = 2000.0, 15

Call = Callable[[], Any]


def shapes(run: Run) -> tuple[tuple[int, int], ...]:
    return ((64, 96),) if run.dry_run else SHAPES


def rows(run: Run) -> tuple[int, ...]:
    return (1, 8) if run.dry_run else ROWS


def copies(run: Run, bytes_each: int) -> int:
    if run.dry_run:
        return 2
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(16, -(-2 * cache // bytes_each)))


def microseconds(run: Run, calls: list[Call], graph: bool = True) -> float:
    """Median time of one call, over rounds of all of them."""
    for call in calls[:2] * 2:
        call()
    run.synchronize()
    if run.dry_run:
        return _by_clock(calls)
    replay = _captured(calls) if graph else lambda: [call() for call in calls]
    once = _by_events(replay, 1)
    repeats = max(1, min(200, int(SAMPLE_US / max(once, 1.0))))
    return statistics.median(_by_events(replay, repeats) for _ in range(SAMPLES)) / len(calls)


def _by_clock(calls: list[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - started) / len(calls)


def _captured(calls: list[Call]) -> Call:
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _by_events(replay: Call, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats


def copy_bandwidth(run: Run) -> float:
    """Bytes read and written a microsecond by a large copy."""
    size = 1 << (20 if run.dry_run else 30)
    source = torch.empty(size, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    return 2 * size / microseconds(run, [lambda: target.copy_(source)])


def _ours(run: Run, m: int, n: int, k: int, outliers: int) -> list[Call]:
    x, weight, scale, _ = problem(run, m, n, k, torch.bfloat16, outliers)
    weights = [weight.clone() for _ in range(copies(run, n * k))]
    return [lambda w=w: linear(x, w, scale, None, THRESHOLD, "column") for w in weights]  # type: ignore[misc]


def _product_alone(run: Run, m: int, n: int, k: int) -> list[Call]:
    """No quantisation, no outlier columns."""
    x, weight, scale, _ = problem(run, m, n, k, torch.bfloat16)
    q, row_scale, _ = torch.ops.int8compile.quantize_rowwise(x, THRESHOLD)
    weights = [weight.clone() for _ in range(copies(run, n * k))]
    multiply = torch.ops.int8compile.scaled_mm
    return [lambda w=w: multiply(q, row_scale, x, None, w, scale, None, torch.bfloat16) for w in weights]  # type: ignore[misc]


def _bf16(run: Run, m: int, n: int, k: int) -> list[Call]:
    x = torch.randn(m, k, device=run.device).bfloat16()
    weights = [torch.randn(n, k, device=run.device, dtype=torch.bfloat16) for _ in range(copies(run, 2 * n * k))]
    return [lambda w=w: nn.functional.linear(x, w) for w in weights]  # type: ignore[misc]


def layers(run: Run) -> dict[str, Any]:
    """Ours with 0, 4 and 64 outlier columns, its parts, and bf16; and what share of bandwidth and peak that is."""
    load(run)
    result: dict[str, Any] = {"complete": False, "copy_bytes_per_us": copy_bandwidth(run), "cases": []}
    for k, n in shapes(run):
        for m in rows(run):
            if run.left() < 8:
                return result
            case: dict[str, Any] = {"k": k, "n": n, "m": m, "us": {}, "absent": {}}
            forms: dict[str, Callable[[], list[Call]]] = {
                "bf16": lambda m=m, n=n, k=k: _bf16(run, m, n, k),  # type: ignore[misc]
                "product alone": lambda m=m, n=n, k=k: _product_alone(run, m, n, k),  # type: ignore[misc]
                **{
                    f"int8, {count} outliers": lambda m=m, n=n, k=k, c=count: _ours(run, m, n, k, c)  # type: ignore[misc]
                    for count in (4, 0, 64)
                },
            }
            for name, prepare in forms.items():
                _time(run, case, name, prepare)
            _quantize_time(run, case)
            _kernel_times(run, case)
            result["cases"].append(case)
            run.save("layers", result)
    result["complete"] = True
    return result


def _time(run: Run, case: dict[str, Any], name: str, prepare: Callable[[], list[Call]], graph: bool = True) -> None:
    """Add a time to a case, or why there is none."""
    try:
        case["us"][name] = microseconds(run, prepare(), graph)
    except Exception as error:  # a peer's may be anything; it stands in the results
        case["absent"][name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _quantize_time(run: Run, case: dict[str, Any]) -> None:
    x = problem(run, case["m"], 16, case["k"], torch.bfloat16, 4)[0]
    _time(run, case, "quantise", lambda: [lambda: torch.ops.int8compile.quantize_rowwise(x, THRESHOLD)] * 4)


def _kernel_times(run: Run, case: dict[str, Any]) -> None:
    """The kernels that could have been chosen, each by force: is the dispatch table right?"""
    m, n, k = case["m"], case["n"], case["k"]
    names = ("fused", "skinny") if m <= 8 else ("t64x64", "t128x128", "wgmma128", "wgmma256")
    if run.dry_run or (k, n) not in (SHAPES[0], SHAPES[1]):
        return
    for name in names:
        if name.startswith("wgmma") and not wgmma_is_used(run):
            continue
        with forced(run, name):
            _time(run, case, f"kernel {name}", lambda: _ours(run, m, n, k, 4))


def peers(run: Run) -> dict[str, Any]:
    """torch._int_mm with inductor around it, torchao, bitsandbytes, and Triton's templates by max-autotune."""
    load(run)
    result: dict[str, Any] = {"complete": False, "cases": []}
    chosen = shapes(run)[:2]
    for m, (k, n) in [(m, shape) for m in rows(run) for shape in chosen]:
        if run.left() < 12:
            return result
        case: dict[str, Any] = {"k": k, "n": n, "m": m, "us": {}, "absent": {}}
        _time(run, case, "_int_mm + inductor", lambda m=m, n=n, k=k: _int_mm(run, m, n, k, {}))  # type: ignore[misc]
        _time(run, case, "torchao", lambda m=m, n=n, k=k: _torchao(run, m, n, k))  # type: ignore[misc]
        _time(run, case, "bitsandbytes", lambda m=m, n=n, k=k: _bitsandbytes(run, m, n, k), graph=False)  # type: ignore[misc]
        result["cases"].append(case)
        run.save("peers", result)
    for m in (rows(run)[-1], rows(run)[0]):
        if run.left() > 45 or run.dry_run:
            case = {"k": chosen[0][0], "n": chosen[0][1], "m": m, "us": {}, "absent": {}}
            options = {} if run.dry_run else {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
            _time(run, case, "Triton", lambda m=m, case=case, o=options: _int_mm(run, m, case["n"], case["k"], o))  # type: ignore[misc]
            result["cases"].append(case)
    result["complete"] = True
    return result


def _int_mm(run: Run, m: int, n: int, k: int, options: dict[str, Any]) -> list[Call]:
    """int8 dynamic without outliers, as one writes it: quantise, ``torch._int_mm``, rescale, compiled by inductor."""
    x, weight, scale, _ = problem(run, m, n, k, torch.bfloat16)
    padded = max(m, 17)

    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        row = x.float().abs().amax(1, keepdim=True) / 127
        q = torch.round(x.float() / row).to(torch.int8)
        q = nn.functional.pad(q, (0, 0, 0, padded - m))
        return (torch._int_mm(q, weight.t())[:m].float() * row * scale).bfloat16()

    torch._dynamo.reset()
    compiled = torch.compile(forward, dynamic=False, options=options)
    weights = [weight.clone() for _ in range(copies(run, n * k))]
    return [lambda w=w: compiled(x, w) for w in weights]  # type: ignore[misc]


def _torchao(run: Run, m: int, n: int, k: int) -> list[Call]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    x = torch.randn(m, k, device=run.device).bfloat16()
    count = copies(run, n * k)
    model = nn.ModuleList(nn.Linear(k, n, bias=False, device=run.device, dtype=torch.bfloat16) for _ in range(count))
    quantize_(model.requires_grad_(False), Int8DynamicActivationInt8WeightConfig())
    torch._dynamo.reset()
    forward: Any = torch.compile(lambda layer, x: layer(x), dynamic=False)

    def call(layer: nn.Module) -> Any:
        with torch.inference_mode():
            return forward(layer, x)

    return [lambda layer=layer: call(layer) for layer in model]  # type: ignore[misc]


def _bitsandbytes(run: Run, m: int, n: int, k: int) -> list[Call]:
    import bitsandbytes as bnb

    x = problem(run, m, 8, k, torch.float16, 4)[0]
    layers = []
    for _ in range(copies(run, n * k)):
        layer = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=THRESHOLD)
        layers.append(layer.to(run.device).eval().requires_grad_(False))

    def call(layer: nn.Module) -> Any:
        with torch.inference_mode():
            return layer(x)

    return [lambda layer=layer: call(layer) for layer in layers]  # type: ignore[misc]
