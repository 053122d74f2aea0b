"""What the system says about the CPU, in ``/proc/cpuinfo`` and ``/sys``."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from pathlib import Path

#: where Linux describes the CPU; tests put another description there
CPUINFO = Path("/proc/cpuinfo")
#: where it describes the caches of the first of its cores
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def cpu_says(*names: str) -> str | None:
    """The first processor's entry of one of these names; empty if it has none, None where there is no description."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return None
    line = re.search(rf"^(?:{'|'.join(names)})\s*:(.*)$", text, re.MULTILINE)
    return line[1].strip() if line else ""


def cpu_name() -> str:
    """For people: what the CPU calls itself, or its architecture."""
    return cpu_says("model name") or platform.processor() or platform.machine()


def cpu_key() -> str:
    """The same for CPUs of one kind: of the same name, instructions and sizes of caches."""
    fields = ("model name", "CPU implementer", "CPU part")
    said = [cpu_says(field) or "" for field in fields] + sorted((cpu_says("flags", "Features") or "").split())
    text = repr((platform.machine(), cpu_name(), said, _caches()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _caches() -> list[str]:
    sizes = []
    for path in sorted(CACHES.glob("index*/size")):
        with contextlib.suppress(OSError):
            sizes.append(path.read_text().strip())
    return sizes
