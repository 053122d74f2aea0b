"""Who is timed by ``benchmarks/linear``: linears of one shape, each made ready from the same float weight.

A contender prepares ``Prepared``: a call that runs one linear for each of its weight copies. With many copies a small
weight comes from memory, as in a decoder whose layers run one after another, and not from the cache in which a
benchmark of one layer would find it. Every output of every copy is compared with float64 before anything is timed.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from benchmarks.peers import linear8bit, peer

THRESHOLD = 6.0
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 5e-3}  # relative error that a float product and its rounding may have


class WrongResultError(Exception):
    """A contender's output is further from float64 than its arithmetic explains."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape: x [m, k], weight [n, k] (fp32, Gaussian, variance 1 / k)."""

    m: int
    x: torch.Tensor
    weight: torch.Tensor
    cache_bytes: int  # copies of a weight together are at least so large; 0: one copy

    @property
    def k(self) -> int:
        return self.weight.shape[1]

    @property
    def n(self) -> int:
        return self.weight.shape[0]

    @classmethod
    def random(cls, m: int, k: int, n: int, cache_bytes: int) -> Case:
        """The same for the same shape. No value of x reaches the threshold."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(m, k, generator=generator).clamp(-5, 5)
        return cls(m, x, torch.randn(n, k, generator=generator) / k**0.5, cache_bytes)

    def outliers(self, columns: int) -> torch.Tensor:
        """Which so many outlier columns are: evenly spaced."""
        return torch.arange(columns) * self.k // max(1, columns)

    def with_outliers(self, columns: int) -> torch.Tensor:
        """x with so many outlier columns: 20 in the first row, the largest that came in others."""
        x = self.x.clone()
        x[0, self.outliers(columns)] = 20.0
        return x

    def copies(self, bytes_per_weight: float) -> int:
        """How many copies of a weight with so many bytes for each value exceed ``cache_bytes``."""
        return max(1, math.ceil(self.cache_bytes / (bytes_per_weight * self.weight.numel())))

    def weights(self, count: int, dtype: torch.dtype = torch.float32) -> Iterator[torch.Tensor]:
        """Copies in memory of their own, each turned by one row against the one before: no two are equal."""
        weight = self.weight.to(dtype)
        return (weight.roll(i, 0) for i in range(count))


@dataclasses.dataclass
class Prepared:
    """A contender made ready for a case.

    Args:
        run: one linear with each weight copy; their outputs.
        calls: how many those are.
        expected: output [m, n] in float64 of the first copy; the others' are that, turned.
        tolerance: relative error (Frobenius norm) that the contender's arithmetic explains.
    """

    run: Callable[[], list[torch.Tensor]]
    calls: int
    expected: torch.Tensor
    tolerance: float

    def error(self) -> float:
        """The largest relative error of a copy's output.

        Raises:
            WrongResultError: it is above the tolerance, or not a number.
        """
        norm = self.expected.norm()
        error = 0.0
        outputs = self.run()
        if len(outputs) != self.calls:
            raise WrongResultError(f"{len(outputs)} outputs; expected {self.calls}")
        for i, output in enumerate(outputs):
            distance = float((output.double() - self.expected.roll(i, 1)).norm() / norm)
            error = max(error, distance) if math.isfinite(distance) else math.inf
        if error > self.tolerance:
            raise WrongResultError(f"relative error {error:.2g}; expected at most {self.tolerance:.2g}")
        return error


Prepare = Callable[[Case], Prepared]


def contenders(dtypes: list[torch.dtype]) -> dict[str, Prepare]:
    """All contenders by name; those that take activations once for each dtype, as ``ours-4.float32``."""
    found: dict[str, Prepare] = {
        "linear.float32": lambda case: float_linear(case, torch.float32),
        "linear.bfloat16": lambda case: float_linear(case, torch.bfloat16),
        "int_mm": int_mm,
    }
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        made: dict[str, Callable[..., Prepared]] = {
            "onednn-u8s8": functools.partial(onednn, codes_dtype=torch.uint8),
            "onednn-s8s8": functools.partial(onednn, codes_dtype=torch.int8),
            "torchao": torchao,
            "bitsandbytes": bitsandbytes,
            "ours-0": functools.partial(ours, outlier_columns=lambda k: 0),
            "ours-4": functools.partial(ours, outlier_columns=lambda k: 4),
            "ours-1%": functools.partial(ours, outlier_columns=lambda k: max(1, round(0.01 * k))),
            "ours-2%": functools.partial(ours, outlier_columns=two_percent),
            "ours-none": functools.partial(ours, outlier_columns=lambda k: 0, outlier_policy="none"),
            "ours-calibrated": functools.partial(ours, outlier_columns=two_percent, outlier_policy="calibrated"),
            "ours-weights": weights_only,
        }
        for key, make in made.items():
            found[f"{key}.{name}"] = functools.partial(make, dtype=dtype)
    return found


def two_percent(k: int) -> int:
    """As many columns as ``int8compile.calibrate`` chooses on average."""
    return max(1, round(0.02 * k))


def float_linear(case: Case, dtype: torch.dtype) -> Prepared:
    """``F.linear``."""
    x = case.x.to(dtype)
    weights = list(case.weights(case.copies(dtype.itemsize), dtype))
    expected = x.double() @ weights[0].double().t()
    return Prepared(
        lambda: [functional.linear(x, weight) for weight in weights], len(weights), expected, EPSILON[dtype]
    )


def int_mm(case: Case) -> Prepared:
    """``torch._int_mm`` and nothing around it: int8 codes in, int32 sums out, which must be exact."""
    codes = torch.ops.int8compile.quantize_rowwise(case.x, 0.0)[0]
    weights = [_int8(weight)[0] for weight in case.weights(case.copies(1))]
    expected = codes.double() @ weights[0].double().t()
    return Prepared(lambda: [torch._int_mm(codes, weight.t()) for weight in weights], len(weights), expected, 0.0)


def onednn(case: Case, dtype: torch.dtype, codes_dtype: torch.dtype) -> Prepared:
    """oneDNN's product of a prepacked int8 weight: a quantised activation (one scale for all) in, floats out.

    The ceiling: no quantising, no row scales, no outliers. Unsigned codes (zero point 128) are what VNNI multiplies,
    signed ones what AMX does; which is faster depends on the CPU. Without VNNI, oneDNN adds pairs of products in 16
    bits, which saturate: its result is off by a percent or so unless the weight keeps to 7 bits, as it then does here.
    """
    zero_point = 128 if codes_dtype == torch.uint8 else 0
    scale = float(case.x.abs().max()) / 127
    codes = ((case.x / scale).round() + zero_point).to(codes_dtype)
    weights = [_int8(weight) for weight in case.weights(case.copies(1))]
    if not torch.cpu._is_vnni_supported():
        weights = [(torch.div(w, 2, rounding_mode="trunc"), 2 * s) for w, s in weights]
    expected = scale * ((codes.double() - zero_point) @ weights[0][0].double().t()) * weights[0][1].double()
    packed = [(torch.ops.onednn.qlinear_prepack(w, [case.m, case.k]), s) for w, s in weights]
    del weights
    zeros = torch.zeros(case.n, dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise.default

    def run() -> list[torch.Tensor]:
        return [multiply(codes, scale, zero_point, w, s, zeros, None, 1.0, 0, dtype, "none", [], "") for w, s in packed]

    return Prepared(run, len(packed), expected, EPSILON[dtype])


def torchao(case: Case, dtype: torch.dtype) -> Prepared:
    """torchao's int8 dynamic linears, compiled by inductor with max-autotune and freezing.

    Frozen weights are constants of the compiled code, so one graph holds all copies, each with an activation of its
    own (one that they shared would be quantised only once). This spares torchao guards at each linear, as in a model.
    """
    quantization = peer("torchao", "quantization")
    copies = case.copies(1)
    x = case.x.to(dtype)
    layers = nn.ModuleList()
    for weight in case.weights(copies, dtype):
        layer = nn.Linear(case.k, case.n, bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    expected = x.double() @ case.weight.to(dtype).double().t()
    quantization.quantize_(layers, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    xs = [x.clone() for _ in range(copies)]

    def run(xs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(layers, xs, strict=True)]

    torch._dynamo.reset()
    compiled: Any = torch.compile(run, dynamic=False, options={"freezing": True, "max_autotune": True})
    compiled(xs)
    return Prepared(lambda: compiled(xs), copies, expected, _int8_error(case.weight, x, dtype))


def bitsandbytes(case: Case, dtype: torch.dtype) -> Prepared:
    """``Linear8bitLt`` with LLM.int8()'s threshold and 4 outlier columns."""
    bnb = peer("bitsandbytes", "nn")
    x = case.with_outliers(4).to(dtype)
    layers = [linear8bit(bnb, weight, None, THRESHOLD) for weight in case.weights(case.copies(1), dtype)]
    expected = x.double() @ case.weight.to(dtype).double().t()
    # It casts to fp16 on the way, and takes more of a row as outliers than the formula does.
    tolerance = 1.1 * _int8_error(case.weight, x, dtype) + 2e-3
    return Prepared(lambda: [layer(x) for layer in layers], len(layers), expected, tolerance)


def ours(
    case: Case, dtype: torch.dtype, outlier_columns: Callable[[int], int], outlier_policy: str = "column"
) -> Prepared:
    """``int8compile::linear``: quantises the activation, multiplies, adds the outlier product, scales and casts."""
    count = outlier_columns(case.k)
    x, columns = case.with_outliers(count).to(dtype), case.outliers(count)
    weights = [_int8(weight.to(dtype)) for weight in case.weights(case.copies(1))]
    calibrated = outlier_policy == "calibrated"
    chosen = [(columns.int(), w[:, columns].contiguous()) if calibrated else (None, None) for w, _ in weights]
    expected = x.double() @ case.weight.to(dtype).double().t()
    linear = torch.ops.int8compile.linear.default
    calls = [(*weight, None, THRESHOLD, outlier_policy, *its) for weight, its in zip(weights, chosen, strict=True)]

    def run() -> list[torch.Tensor]:
        return [linear(x, *call) for call in calls]

    return Prepared(run, len(weights), expected, _int8_error(case.weight, x, dtype))


def weights_only(case: Case, dtype: torch.dtype) -> Prepared:
    """``int8compile::linear`` with outlier policy "all": floats times int8 weights, nothing quantised."""
    x = case.x.to(dtype)
    weights = [_int8(weight.to(dtype)) for weight in case.weights(case.copies(1))]
    codes, scale = weights[0]
    expected = x.double() @ (codes.double() * scale.double()[:, None]).t()
    linear = torch.ops.int8compile.linear.default

    def run() -> list[torch.Tensor]:
        return [linear(x, weight, scale, None, 0.0, "all") for weight, scale in weights]

    return Prepared(run, len(weights), expected, EPSILON[dtype])


def _int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = torch.ops.int8compile.quantize_weight(weight)
    return codes, scale


def _int8_error(weight: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> float:
    """The relative error that rounding both operands to int8 explains, with a quarter to spare.

    Rounding to steps of s is noise of variance s^2 / 12, independent in each element; so the expected square of the
    output's error is (sum of row scales^2 |W|^2 + sum of weight scales^2 |X|^2) / 12. Outlier elements (at least the
    threshold) are not rounded.
    """
    x, weight = x.double(), weight.double()
    inliers = x.masked_fill(x.abs() >= THRESHOLD, 0)
    row_scale = inliers.abs().amax(1) / 127
    weight_scale = weight.abs().amax(1) / 127
    noise = row_scale.square().sum() * weight.square().sum() + weight_scale.square().sum() * x.square().sum()
    signal = x.square().sum() * weight.square().sum() / weight.shape[1]  # |X W^T|^2 for independent X and W
    return 1.25 * float((noise / 12 / signal).sqrt()) + EPSILON[dtype]
