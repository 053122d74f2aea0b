"""``int8compile doctor``'s answer as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from int8compile.cli.output import err, out


def print_diagnosis(found: dict[str, Any]) -> None:
    """Print what ``native.doctor.diagnose`` found; problems to stderr."""
    kernels, tools = found["kernels"], found["tools"]
    packages = [f"{name} {version}" for name, version in found["packages"].items() if version]
    rows = {
        "int8compile": f"{found['int8compile']}, Python {found['python']}, torch {found['torch']}",
        "packages": ", ".join(packages) or "none of the optional ones",
        "CPU": f"{found['machine']}, torch sees {found['cpu']['capability']}, {found['cpu']['threads']} threads",
        "GPUs": ", ".join(found["gpus"]) or "none",
        "CPU kernels": _describe_kernels(kernels),
        "tuned": _describe_tuned(found["tuned"]),
        **{tool: path or "not found" for tool, path in tools.items()},
        "builds in": _describe_folder(found["cache_folder"]),
        **{f"library {name}": _describe_library(library) for name, library in found["libraries"].items()},
    }
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows.items():
        table.add_row(name, text)
    out.print(table, highlight=False, markup=False)
    for problem in found["problems"]:
        err.print(f"problem: {problem}", style="red", markup=False, highlight=False)


def _describe_folder(folder: dict[str, Any]) -> str:
    if folder["temporary"]:
        return f"a temporary folder takes its place: {folder['temporary']}"
    if folder["path"] is None:
        return "a temporary folder of each process"
    return f"{folder['path']}{'' if folder['writable'] else ' (cannot be written to)'}"


def _describe_library(library: dict[str, Any]) -> str:
    if library["built"]:
        return f"{library['path']} (its checksum matches)"
    return library["problem"] or "not built yet (int8compile build)"


def _describe_kernels(kernels: dict[str, Any]) -> str:
    if kernels["chosen"] is None:
        return "not built yet (int8compile build, or the first compiled model, does it)"
    available = " ".join(kernels["available"])
    wanted = "" if kernels["requested"] == "auto" else f"; INT8COMPILE_CPU_ISA={kernels['requested']}"
    return f"{kernels['chosen']}, of {available}{wanted}"


def _describe_tuned(tuned: dict[str, Any]) -> str:
    if tuned["problem"]:
        return f"not used: {tuned['problem']}"
    if not tuned["days"]:
        another = "another version was; " if tuned["others"] else ""
        return f"no ({another}int8compile tune measures what is the fastest here)"
    parts = []
    for threads, day in tuned["days"].items():
        changes = [change for change in tuned["changes"] if str(change["threads"]) == threads]
        best = max((change["gain"] for change in changes), default=1.0)
        of = f", up to {best:.2f} times as fast" if changes else ""
        parts.append(f"{len(changes)} choices for {threads} threads on {day}{of}")
    return f"{'; '.join(parts)}: {tuned['path']}"
