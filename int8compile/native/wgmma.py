"""Hopper's wgmma kernels are used only where a proof has run, once for each GPU model and build.

The proof runs in a process of its own (``proof.py``), since kernels that fail could hang or destroy the process's CUDA
context. Its result is kept next to the library. Before the proof begins, "failed" is written there: if a process is
killed because the proof hangs, the next process does not hang too.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from int8compile.files import replaced
from int8compile.native import kernel_cache
from int8compile.native.trust import opened

_PROVEN = "proven"
_NOT_ENDED = "their proof did not end"


def hopper() -> int | None:
    """The first GPU that has wgmma."""
    gpus = range(torch.cuda.device_count())
    return next((i for i in gpus if torch.cuda.get_device_capability(i) == (9, 0)), None)


def problem(library: Path, device: int) -> str | None:
    """Why wgmma cannot be used with this library on this GPU; None if it can."""
    name = "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))
    verdict = library.parent / f"wgmma-{name}"
    found = _read(verdict)
    if found is None:
        with kernel_cache.locked(verdict.with_suffix(".lock")):
            found = _read(verdict)  # another process may have proven them while this one waited
            if found is None:
                found = _prove(library, device, verdict)
    return None if found == _PROVEN else f"{found} (delete {verdict} to try again)"


def _prove(library: Path, device: int, verdict: Path) -> str:
    _write(verdict, _NOT_ENDED)
    try:
        found = _failed_proof(library, device) or _PROVEN
    except BaseException:  # Ctrl-C says nothing about the kernels
        with contextlib.suppress(OSError):
            verdict.unlink()
        raise
    _write(verdict, found)
    return found


def _read(verdict: Path) -> str | None:
    """What is kept; None if nothing is, or nothing that is ours or whole."""
    try:
        with opened(verdict) as file:
            return file.read().decode(errors="replace") or None
    except OSError:
        return None


def _write(verdict: Path, text: str) -> None:
    """Whole or not at all; where nothing can be written, every process proves them for itself."""
    # Whatever the umask: who may read it is for the folder to say.
    with contextlib.suppress(OSError), replaced(verdict, mode=0o644) as whole:
        whole.write_text(text)


def _failed_proof(library: Path, device: int) -> str:
    """Why wgmma cannot be used; empty if it can."""
    command = [sys.executable, "-m", "int8compile.native.proof", str(library), str(device)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"their proof did not end: {type(error).__name__}"
    if done.returncode == 0:
        return ""
    lines = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()
    return f"their proof failed: {lines[-1]}"
