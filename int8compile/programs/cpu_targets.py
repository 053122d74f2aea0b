"""The CPUs that a package's generated code can be compiled for, and whether this one can run it.

The native kernels choose their instructions on the machine that runs them. The code that inductor generates around
them does not: compiled for this CPU (``-march=native``), it ends with an illegal instruction on an older one. So
packages are by default compiled for what most CPUs have, record what they need, and are checked before they are
loaded.
"""

from __future__ import annotations

import platform
import re
from typing import NamedTuple

import torch

from int8compile.cpuinfo import cpu_says
from int8compile.errors import OptionValueError


class CpuTarget(NamedTuple):
    """What a package is compiled for.

    Args:
        name: as users say it.
        vector_bits: width of the vectors that inductor writes its loops with; 1: none; None: as wide as they are here.
        march: the compiler's name for it; None: this CPU.
        flags: what a CPU must have to run it, named as in /proc/cpuinfo.
    """

    name: str
    vector_bits: int | None
    march: str | None
    flags: tuple[str, ...]


_V3 = ("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "popcnt", "sse4_1", "sse4_2", "ssse3")
_X86 = {
    "avx2": CpuTarget("avx2", 256, "x86-64-v3", _V3),
    "portable": CpuTarget("portable", 1, "x86-64", ()),
}
# What compilers use of their own accord, and what inductor's templates call by name.
_USED = re.compile(
    "|".join(_V3)
    + r"|avx512\w+|avx_\w+|amx_\w+|gfni|fma4|vaes|vpclmulqdq|asimd\w*|sve\w*|i8mm|bf16|fphp|sha3|sha512|atomics"
)


def cpu_target(name: str | None) -> CpuTarget:
    """The target of this name; by default the widest that all of today's CPUs of this kind have.

    Raises:
        OptionValueError: no such target, or not for this kind of CPU.
    """
    here = cpu_flags()
    targets = {"native": CpuTarget("native", None, None, tuple(sorted(here)))}
    if platform.machine() in ("x86_64", "AMD64"):
        # inductor writes no vectors that it cannot try out
        targets |= {key: target for key, target in _X86.items() if here.issuperset(target.flags)}
    if name is None:
        return next(targets[n] for n in ("avx2", "portable", "native") if n in targets)
    if name not in targets:
        raise OptionValueError(
            "cpu_isa", name, f"one of {', '.join(sorted(targets))} (what can be compiled for on this machine)"
        )
    return targets[name]


def vector_bits(name: str | None) -> int | None:
    """Of the target of this name, on any machine."""
    return _X86[name].vector_bits if name in _X86 else None


def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU as ``/proc/cpuinfo`` names them; empty where the system does not say."""
    flags = cpu_says("flags", "Features")
    if flags is None:
        return frozenset(_V3) if torch.backends.cpu.get_cpu_capability().startswith("AVX") else frozenset()
    return frozenset(flag for flag in flags.split() if _USED.fullmatch(flag))
