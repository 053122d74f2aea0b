"""Run a program in float and in int8 and tell whether they agree up to the noise that int8 has in that program.

How large that is depends on the program, so it is measured: the program is run in float with what every product reads
rounded to 8 bits, in two different ways, and in many more where that noise does not explain a difference. (A program
can ask which values are above 0, and make much of those that noise has moved across.)
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from compiling import compile_eager
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import int8compile
from fuzz.programs import Program, namespace

#: a difference of more than so many times the noise is no rounding
NOISE_FACTOR = 8
#: so many times a program is run for its noise before a difference is believed
MANY = 40
#: relative to the largest value of a result, what is no difference at all
EXACT = {torch.float32: 1e-3, torch.bfloat16: 4e-2, torch.float16: 1e-2}
#: noise of more than this tells nothing
USELESS = 0.3

#: what a program is compiled with, by its seed
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"activation": "float"},
    {"llm_int8_weight_only_modules": ["l0", "w1", "w2"]},
)


@dataclasses.dataclass
class Verdict:
    """What came of a program; ``problem`` is empty where all is well."""

    problem: str = ""
    rewritten: int = 0
    sites: int = 0
    compared: int = 0


_PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.addmm, torch.einsum, torch._C._nn.linear, torch.bmm}
_METHODS = {"matmul", "mm", "addmm", "__matmul__", "linear", "einsum", "bmm", "_grouped_mm"}


class Rounded(TorchFunctionMode):
    """Products read their operands rounded to 8 bits, with one scale a row."""

    def __init__(self, stretch: float) -> None:
        super().__init__()
        self.stretch = stretch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS or getattr(func, "__name__", "").split(".")[0] in _METHODS:
            args = torch.utils._pytree.tree_map_only(torch.Tensor, self.rounded, args)
            kwargs = {
                k: self.rounded(v) if isinstance(v, torch.Tensor) and k != "out" else v for k, v in kwargs.items()
            }
            kwargs |= {"tensors": list(map(self.rounded, kwargs["tensors"]))} if "tensors" in kwargs else {}
        return func(*args, **kwargs)

    def rounded(self, value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point() or value.dim() == 0 or value.dtype is torch.float64:
            return value
        scale = value.abs().amax(-1, keepdim=True).clamp(min=1e-6) * self.stretch / 127
        return ((value / scale).round() * scale).to(value.dtype)


def results_of(program: Program, module: nn.Module, call: Callable[..., Any]) -> list[torch.Tensor]:
    """All results of all calls of a program, and after each what is left in its inputs, weights and buffers."""
    results: list[torch.Tensor] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, batch in enumerate(program.batches):
            if number:
                exec(program.between, {**namespace(), "self": module})
            inputs = program.inputs(batch)
            out = call(*inputs)
            results += [t.detach().clone() for t in (*out, *inputs, *module.state_dict().values())]
    return results


def check(program: Program) -> Verdict:
    """Whether a program means the same in int8."""
    module = program.build()
    try:
        expected = results_of(program, module, module)
    except Exception:
        return Verdict()  # it does not run in float (at another batch size, say)
    try:
        noisy = [rounded_results(program, stretch) for stretch in (1.0, 1.07)]
    except Exception:
        return Verdict()  # noise takes it down a way that does not run in float either
    torch._dynamo.reset()
    module = program.build()
    try:
        actual = results_of(program, module, compiled(program, module))
    except Exception as error:
        return Verdict(f"{type(error).__name__}: {error}" if _is_right_in_float(program, expected) else "")
    report = int8compile.last_report()
    verdict = Verdict(rewritten=report.rewritten if report else 0, sites=len(report.sites) if report else 0)
    for i, (got, want) in enumerate(zip(actual, expected, strict=True)):
        problem = difference(got, want, [other[i] for other in noisy], EXACT[program.dtype])
        if problem is None:
            continue
        verdict.compared += 1
        if problem and len(noisy) < MANY:
            noisy += filter(None, (_rounded_if_it_runs(program, 1 + step / 100) for step in range(len(noisy), MANY)))
            problem = difference(got, want, [other[i] for other in noisy], EXACT[program.dtype])
        if problem and _is_right_in_float(program, expected):
            verdict.problem = f"result {i} of {len(actual)}: {problem}"
            return verdict
    return verdict


def rounded_results(program: Program, stretch: float) -> list[torch.Tensor]:
    module = program.build()
    with Rounded(stretch):
        return results_of(program, module, module)


def _rounded_if_it_runs(program: Program, stretch: float) -> list[torch.Tensor] | None:
    try:
        return rounded_results(program, stretch)
    except Exception:
        return None


def compiled(program: Program, module: nn.Module) -> Callable[..., Any]:
    options = OPTIONS[program.seed % len(OPTIONS)]
    if program.inductor:
        return torch.compile(module, backend="int8", options={"min_features": 0, **options})
    return compile_eager(module, **options)


def difference(got: torch.Tensor, want: torch.Tensor, noisy: list[torch.Tensor], exact: float) -> str | None:
    """What is wrong with a result; empty if nothing, None if it tells nothing."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return f"{got.dtype} {list(got.shape)}, in float {want.dtype} {list(want.shape)}"
    if want.numel() == 0 or not want.is_floating_point():
        return None
    got, want, noisy = got.double(), want.double(), [other.double() for other in noisy]
    if not want.isfinite().all() or any(other.shape != want.shape or not other.isfinite().all() for other in noisy):
        return None
    size = float(want.abs().max())
    noise = max((float((other - want).abs().max()) for other in noisy), default=0.0)
    if noise > USELESS * size:
        return None
    error = float((got - want).abs().nan_to_num(nan=float("inf")).max())
    allowed = NOISE_FACTOR * noise + exact * size
    return (
        "" if error <= allowed else f"off by {error:.3g}, of values up to {size:.3g}, where int8's noise is {noise:.2g}"
    )


def _is_right_in_float(program: Program, expected: list[torch.Tensor]) -> bool:
    """Whether PyTorch's own compiler takes a program, and says the same as without it.

    Where it does not (shapes changed in place, and asked for in Python), the mistake is not ours.
    """
    torch._dynamo.reset()
    module = program.build()
    try:
        results = results_of(
            program, module, torch.compile(module, backend="inductor" if program.inductor else "eager")
        )
    except Exception:
        return False
    exact = EXACT[program.dtype]
    return all(not difference(got, want, [], exact) for got, want in zip(results, expected, strict=True))


def quiet() -> None:
    """Keep logs of compilers and of the package from covering what is found."""
    for name in ("torch", "int8compile", "torch._dynamo", "torch._inductor"):
        logging.getLogger(name).setLevel(logging.ERROR)
