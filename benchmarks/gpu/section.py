"""What the sections of ``benchmarks.gpu`` have in common, and the first of them: the kernels' build."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from tests.helpers.gpu import load


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


def build(run: Run) -> dict[str, Any]:
    """The library, built or found, and the machine."""
    from int8compile.native import loader

    started = time.perf_counter()
    load(run.device)
    if not run.dry_run:
        loader.load("common")  # which compiled models need too: built here, and not in the time of what comes later
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - started, 1), "machine": common.machine(run.device)}
    if not run.dry_run:
        library = loader.binary_path("cuda")
        verdicts = {path.name: path.read_text() or "proven" for path in library.parent.glob("wgmma-*")}
        found |= {"library": str(library), "wgmma": verdicts, "capability": torch.cuda.get_device_capability()}
    return found
