"""What a command writes: results and JSON to stdout; progress and failures to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from int8compile.errors import Int8CompileError

#: called with a step, how much of it is done, and of how much
Tell = Callable[[str, int, int | None], None]

out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


@contextlib.contextmanager
def progress_bars(quiet: bool, amount: ProgressColumn | None = None) -> Iterator[Tell]:
    """Bars on stderr, one a step: how much of it is done, or only that it goes on, and for how long."""
    columns = (TextColumn("{task.description}"), BarColumn(), amount or MofNCompleteColumn(), TimeElapsedColumn())
    # What a model of the user's prints must not come into the JSON on stdout.
    elsewhere = contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext()
    with elsewhere, Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(escape(step), total=total)
            bars.update(tasks[step], completed=done, total=total)

        yield progress


class failures_to_stderr:  # noqa: N801 (reads as the statement it is)
    """Turns an error of ours into its message on stderr and exit code 1."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (Int8CompileError, OSError)):
            err.print(f"int8compile: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    print(json.dumps(value, indent=2))
