"""The tunable ``product``: which of the provider's CPU kernels multiplies, by rows, K and N (``csrc/cpu/plan.cpp``).

Whole operator calls are timed, quantising and outlier columns included, on weights that come from memory as a model's
do: copies of each fill 64 MiB and take turns.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping

import torch

from int8compile.native import tuned
from int8compile.tuning.measure import Case, Run
from int8compile.tuning.request import Request

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_WEIGHT_BYTES = 64 << 20
_OUTLIERS, _THRESHOLD = 4, 6.0


def cases(request: Request) -> Iterator[Case]:
    """One for each shape and number of rows, where the provider in use has several kernels for it.

    The kernels are loaded and no tuned table is set, so that what they take is the default.
    """
    native, threads = torch.ops.int8compile_native, torch.get_num_threads()
    names = native.cpu_kernels().split()
    dtype = torch.bfloat16 if torch.bfloat16 in request.dtypes else request.dtypes[0]
    for (k, n), rows in itertools.product(request.products, ROWS):
        able = [name for name in names if _can(name, rows, n, k)]
        if len(able) > 1:
            where = tuned.where_of(isa=native.isa(), rows=rows, k=half_octave(k), cols=half_octave(n))
            prepare = functools.partial(_prepare, able, rows, k, n, dtype)
            yield Case(tuned.PRODUCT, where, f"{rows} x {k} x {n}", native.cpu_kernel(rows, n, k, threads), prepare)


def half_octave(size: int) -> int:
    """The smallest size in the step of ``csrc/cpu/plan.h``'s step_of that this one is in: 1, 2, 3, 4, 6, 8, 12, ..."""
    octave = 1 << (size.bit_length() - 1)
    return octave + octave // 2 if size >= octave + octave // 2 and octave > 1 else octave


def _can(name: str, rows: int, n: int, k: int) -> bool:
    native = torch.ops.int8compile_native
    native.force_cpu_kernel(name)
    try:
        return bool(native.cpu_kernel(rows, n, k, torch.get_num_threads()) == name)
    except ValueError:
        return False
    finally:
        native.force_cpu_kernel("auto")


def _prepare(names: list[str], rows: int, k: int, n: int, dtype: torch.dtype) -> Mapping[str, Run]:
    linear, native = torch.ops.int8compile.linear.default, torch.ops.int8compile_native
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[:_OUTLIERS]] *= 20
    x, scale = x.to(dtype), torch.rand(n, generator=generator)
    weights = itertools.cycle(_weights(k, n))

    def run(name: str, calls: int) -> None:
        native.force_cpu_kernel(name)
        try:
            for weight in itertools.islice(weights, calls):
                linear(x, weight, scale, None, _THRESHOLD, "column")
        finally:
            native.force_cpu_kernel("auto")

    return {name: functools.partial(run, name) for name in names}


@functools.lru_cache(maxsize=1)
def _weights(k: int, n: int) -> tuple[torch.Tensor, ...]:
    """Several of one shape, which the rows of one shape share."""
    count = max(1, _WEIGHT_BYTES // (k * n))
    codes = torch.randint(-127, 128, (count, n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    return tuple(codes)


def release() -> None:
    """Free what the cases keep between one another."""
    _weights.cache_clear()
