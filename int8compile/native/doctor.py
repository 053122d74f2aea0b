"""Collects what ``int8compile doctor`` prints: versions, tools, the CPU's instruction sets, kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import shutil
from typing import Any

import torch

import int8compile
from int8compile.config import cache_folder, cpu_isa
from int8compile.errors import KernelBuildError, OptionValueError
from int8compile.native import builder, kernel_cache, libraries, loader, providers, tuned

_OPTIONAL = ("transformers", "peft", "accelerate", "triton")


def diagnose() -> dict[str, Any]:
    """Everything ``doctor`` prints, as JSON-able values; builds nothing.

    ``problems`` lists what keeps native kernels from being used, or from being kept for the next process, each with
    the way out; empty when all is well.
    """
    problems: list[str] = []
    folder = _cache_folder()
    libraries = {name: _library(name) for name in providers.wanted()}
    ready = all(library["built"] for library in libraries.values())
    found = {
        "int8compile": int8compile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: _version(name) for name in _OPTIONAL},
        "machine": platform.machine(),
        "cpu": {"capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "tools": _tools([] if ready else problems),
        "cache_folder": folder,
        "libraries": libraries,
    }
    if folder["problem"]:
        problems.append(folder["problem"])
    elif not (ready or folder["writable"]):
        problems.append(f"the cache folder {folder['path']} cannot be written to: set INT8COMPILE_CACHE_DIR to another")
    found["kernels"] = _kernels(libraries["cpu"], problems)
    found["tuned"] = _tuned()
    found["problems"] = problems
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tools(problems: list[str]) -> dict[str, str | None]:
    name, compiler = builder.cxx()
    ninja = builder.ninja()
    if compiler is None:
        problems.append(f"no C++ compiler ({name}) was found: install g++ or clang++, or set CXX")
    if ninja is None:
        problems.append("ninja was not found: pip install ninja")
    return {"c++": compiler, "ninja": ninja, "nvcc": shutil.which("nvcc")}


def _cache_folder() -> dict[str, Any]:
    """Where builds are kept, whether they can be, and the temporary folder that this process has instead, if any."""
    temporary = kernel_cache.temporary_in_use()
    found = {"path": None, "writable": False, "problem": None, "temporary": temporary and str(temporary)}
    with contextlib.suppress(OSError):
        found["path"] = str(cache_folder())
    try:
        folder = kernel_cache.user_folder(make=False)
    except kernel_cache.CacheError as error:
        return {**found, "problem": str(error)}
    return {**found, "writable": kernel_cache.is_writable(folder)}


def _library(name: str) -> dict[str, Any]:
    """Where a library is or would be, whether it is there as it was built, and what is wrong with it if it is not."""
    try:
        place, state = libraries.inspect(name)
    except KernelBuildError as error:
        return {"path": None, "built": False, "problem": str(error)}
    return {"path": str(place.binary), "built": state.ready, "problem": state.problem}


def _kernels(library: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The CPU's instruction sets that have kernels, and the one in use; known once the library is built."""
    kernels: dict[str, Any] = {"requested": cpu_isa(), "available": None, "chosen": None}
    if not library["built"]:
        return kernels
    try:
        loader.load("cpu", build=False)
    except (KernelBuildError, OSError, ValueError) as error:
        problems.append(f"the CPU kernels do not load: {str(error).splitlines()[0]}")
        return kernels
    kernels["available"] = torch.ops.int8compile_native.isas().split()
    kernels["chosen"] = torch.ops.int8compile_native.isa()
    rejected = torch.ops.int8compile_native.rejected().split()
    if rejected:
        problems.append(
            f"the {', '.join(rejected)} kernels compute wrong numbers on this CPU and are not used: report it"
        )
    return kernels


def _tuned() -> dict[str, Any]:
    """The tuned table in use: when it was measured, for how many threads, and what it changes; or why there is none."""
    try:
        found = tuned.inspect()
    except OptionValueError as error:
        found = tuned.Found(tuned.Table(), problem=str(error))
    changes = [
        {**dataclasses.asdict(choice), "where": dict(choice.where)}
        for choice in sorted(found.table.choices, key=lambda choice: (choice.threads, choice.tunable, choice.where))
    ]
    return {
        "path": found.path and str(found.path),
        "days": {str(threads): day for threads, day in found.table.days.items()},
        "changes": changes,
        "problem": found.problem,
        "others": found.others,
    }
