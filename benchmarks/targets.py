"""The targets that int8 on CPUs is built to meet, and how far a run's results are from each.

They are ratios within one run, set for 2 cores with AMX, and for whole models on 2 cores with AVX512-VNNI; on other
CPUs they say where int8 stands, and promise nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import rich.box
import rich.table

#: (k, n, m) -> contender -> median milliseconds; what could not run is not in it
Times = Mapping[tuple[int, int, int], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Row:
    """A target and what was measured.

    Args:
        target: in words.
        limit: what the value should reach; or stay under, if ``at_most``.
        value: the worst of all cases measured; None: nothing was.
        worst: the case it is of.
        met: how many cases meet the target, of how many.
    """

    target: str
    limit: float
    value: float | None
    worst: str
    met: int
    of: int
    at_most: bool = False

    @property
    def verdict(self) -> str:
        """``met``, ``missed by 12%`` (of the limit; the difference, for one to stay under), or ``not measured``."""
        if self.value is None:
            return "not measured"
        if self.met == self.of:
            return "met"
        if self.at_most:
            return f"missed by {self.value - self.limit:.2f}"
        return f"missed by {1 - self.value / self.limit:.0%}"

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "verdict": self.verdict}


def row(target: str, limit: float, values: Iterable[tuple[str, float]], *, at_most: bool = False) -> Row:
    """A Row from the values of all its cases, each with its name."""
    found = [(case, value) for case, value in values if math.isfinite(value)]
    if not found:
        return Row(target, limit, None, "", 0, 0, at_most)
    worst = (max if at_most else min)(found, key=lambda item: item[1])
    met = sum(value <= limit if at_most else value >= limit for _, value in found)
    return Row(target, limit, worst[1], worst[0], met, len(found), at_most)


def linear_targets(times: Times, dtype: str) -> list[Row]:
    """Targets for one linear, of ours with 4 outlier columns and activations of ``dtype``."""
    ours = f"ours-4.{dtype}"
    products = (f"onednn-u8s8.{dtype}", f"onednn-s8s8.{dtype}")

    def against(names: tuple[str, ...], wanted: Callable[[int, int, int], bool]) -> Iterable[tuple[str, float]]:
        for (k, n, m), case in times.items():
            others = [case[name] for name in names if name in case]
            if wanted(k, n, m) and ours in case and others:
                yield f"{k}x{n}, M = {m}", min(others) / case[ours]

    def cost(name: str, base: str) -> Iterable[tuple[str, float]]:
        for (k, n, m), case in times.items():
            if f"{base}.{dtype}" in case and f"{name}.{dtype}" in case:
                yield f"{k}x{n}, M = {m}", case[f"{name}.{dtype}"] / case[f"{base}.{dtype}"] - 1

    prompt = (128, 512)
    bare = "oneDNN's bare int8 product"
    bf16 = ("linear.bfloat16",)
    return [
        row(f"{bare}, M = 128 and 512, K >= 2048", 0.9, against(products, lambda k, n, m: m in prompt and k >= 2048)),
        row(f"{bare}, M = 128 and 512, K < 2048", 0.8, against(products, lambda k, n, m: m in prompt and k < 2048)),
        row(f"{bare}, M = 16", 0.95, against(products, lambda k, n, m: m == 16)),
        row(f"{bare}, M = 1", 1.15, against(products, lambda k, n, m: m == 1)),
        row("bf16 F.linear, M >= 16, K >= 2048", 1.9, against(bf16, lambda k, n, m: m >= 16 and k >= 2048)),
        row("bf16 F.linear, M = 1, K >= 2048", 3.5, against(bf16, lambda k, n, m: m == 1 and k >= 2048)),
        row("bitsandbytes, every shape", 10.0, against((f"bitsandbytes.{dtype}",), lambda k, n, m: True)),
        row("1 % outlier columns cost, against none", 0.15, cost("ours-1%", "ours-0"), at_most=True),
        row("2 % calibrated columns cost, against none", 0.05, cost("ours-calibrated", "ours-none"), at_most=True),
        row("the same, against outlier columns", 0.0, cost("ours-calibrated", "ours-2%"), at_most=True),
    ]


def model_targets(contenders: Mapping[str, Mapping[str, Any]], *, llama: bool = False) -> list[Row]:
    """Targets for a whole model.

    Args:
        contenders: of ``benchmarks/model``'s results, by name; of ours, the fastest dtype counts.
        llama: the model is the Llama-3.2-1B-shaped one, which has targets of its own.
    """

    def fastest(key: str, wanted: Callable[[str], bool]) -> float:
        times = [
            c[f"{key}_ms"]["median"]
            for name, c in contenders.items()
            if wanted(name.split("-", 1)[1]) and c.get(f"{key}_ms")
        ]
        return min(times, default=math.nan)

    def ratio(key: str, backend: str, peers: tuple[str, ...], prefix: str = "") -> list[tuple[str, float]]:
        names = [n for n in contenders if n.startswith(prefix) and n.split("-", 1)[1] in peers]
        times = [(contenders[n][f"{key}_ms"]["median"], n) for n in names if contenders[n].get(f"{key}_ms")]
        if not times:
            return []
        best, name = min(times)
        return [(f"against {name}", best / fastest(key, lambda b: b == backend))]

    bf16 = ("inductor",)
    if _provider(contenders, "avx512vnni"):
        if llama:
            return [
                row(
                    "Llama-3.2-1B's shape, prompt of 512, bf16 inductor",
                    1.6,
                    ratio("prompt", "int8", bf16, "bfloat16-"),
                ),
                row("Llama-3.2-1B's shape, decode step, bf16 inductor", 2.2, ratio("token", "int8", bf16, "bfloat16-")),
                _memory(contenders),
            ]
        return [
            row("prompt of 512, bf16 inductor", 1.5, ratio("prompt", "int8", bf16, "bfloat16-")),
            row("decode step, bf16 inductor", 2.6, ratio("token", "int8", bf16, "bfloat16-")),
            row("the same, lm_head's weights in int8", 3.2, ratio("token", "int8-weights-head", bf16, "bfloat16-")),
            _against_llama_cpp(ratio("token", "int8-head", ("llama.cpp",))),
            _memory(contenders),
        ]
    if llama:
        return [
            row(
                "Llama-3.2-1B's shape, prompt of 512, bf16 inductor",
                1.9,
                ratio("prompt", "int8", ("inductor",), "bfloat16-"),
            ),
            row(
                "Llama-3.2-1B's shape, decode step, bf16 inductor",
                1.8,
                ratio("token", "int8", ("inductor",), "bfloat16-"),
            ),
            _memory(contenders),
        ]
    inductor = ("inductor", "frozen", "autotuned")
    prompt, token = (*inductor, "torchao"), (*inductor, "torchao", "torchao-weights")
    return [
        row("prompt of 512, fastest of inductor and torchao", 1.5, ratio("prompt", "int8", prompt)),
        row("the same, lm_head in int8", 1.7, ratio("prompt", "int8-head", prompt)),
        row("decode step, fastest of inductor and torchao", 2.0, ratio("token", "int8", token)),
        row("the same, lm_head in int8", 2.5, ratio("token", "int8-head", token)),
        _against_llama_cpp(ratio("token", "int8-head", ("llama.cpp",))),
        _memory(contenders),
    ]


def _provider(contenders: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Whether int8 ran by that provider of kernels."""
    providers = [p for c in contenders.values() for p in c.get("report", {}).get("providers", [])]
    return any(name in provider.split() for provider in providers)


def _against_llama_cpp(values: list[tuple[str, float]]) -> Row:
    return row("decode step, llama.cpp Q8_0 (not slower; lm_head in int8, as there)", 1.0, values)


def _memory(contenders: Mapping[str, Mapping[str, Any]]) -> Row:
    """Bytes of int8 forms against those of the same weights in 16 bits."""
    values = [
        (name, c["int8_weight_bytes"] / c["bf16_weight_bytes"])
        for name, c in contenders.items()
        if c.get("bf16_weight_bytes")
    ]
    return row("int8 weights' memory against bf16, rewritten weights", 0.52, values, at_most=True)


def table(rows: Iterable[Row], title: str) -> rich.table.Table:
    """The rows for people."""
    made = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name in ("target: speed against", "limit", "worst", "case", "met", "verdict"):
        made.add_column(name, justify="right" if name in ("limit", "worst", "met") else "left")
    for r in rows:
        sign = "<=" if r.at_most else ">="
        value = "" if r.value is None else f"{r.value:.2f}"
        color = "green" if r.verdict == "met" else "yellow" if r.value is not None else "dim"
        made.add_row(
            r.target,
            f"{sign} {r.limit:g}",
            value,
            r.worst,
            f"{r.met}/{r.of}" if r.of else "",
            f"[{color}]{r.verdict}[/]",
        )
    return made
