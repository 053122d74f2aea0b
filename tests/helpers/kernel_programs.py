"""Builds the programs of ``tests/helpers/kernel_checks``: csrc/cpu's kernels with sanitizers, without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from checkout import HELPERS, ROOT

CPU = ROOT / "csrc" / "cpu"
CHECKS = HELPERS / "kernel_checks"
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off", f"-I{CHECKS}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # which needs ptrace
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=600)


class Recipe(NamedTuple):
    """How a program's files are compiled: those named in `plain` without sanitizers, for speed."""

    flags: tuple[str, ...]
    names: tuple[str, ...]
    plain: tuple[str, ...] = ()

    def compile_object(self, source: Path, folder: Path) -> Path:
        target = folder / f"{source.stem}.o"
        sanitizers = [] if source.stem in self.plain else SANITIZERS
        made = run(os.environ.get("CXX", "c++"), *FLAGS, *self.flags, *sanitizers, "-c", source, "-o", target)
        assert made.returncode == 0, made.stderr
        return target

    def compile_objects(self, folder: Path) -> list[Path]:
        """Of csrc/cpu's files of these names, and of the checks."""
        sources = [CPU / f"{name}.cpp" for name in self.names] + sorted(CHECKS.glob("*.cpp"))
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda source: self.compile_object(source, folder), sources))

    def with_mistake(self, mistake: Mistake, objects: Iterable[Path], folder: Path) -> Path:
        """The program with one of its files compiled anew, a mistake in it."""
        sources = folder / "cpu"
        shutil.copytree(CPU, sources)
        text = (sources / mistake.file).read_text()
        assert text.count(mistake.old) == 1
        (sources / mistake.file).write_text(text.replace(mistake.old, mistake.new))
        changed = self.compile_object(sources / f"{mistake.source}.cpp", folder)
        return link([changed, *(o for o in objects if o.stem != mistake.source)], folder / "check")


class Mistake(NamedTuple):
    """One planted in a file, which makes the check say `complaint`."""

    file: str  # that has `old`
    old: str
    new: str
    source: str  # that is compiled
    check: str
    complaint: str


def link(objects: Iterable[Path], target: Path) -> Path:
    made = run(os.environ.get("CXX", "c++"), *SANITIZERS, "-pthread", *objects, "-o", target)
    assert made.returncode == 0, made.stderr
    return target
