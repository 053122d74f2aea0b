"""Files that come into being whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8compile.errors import ExportError


@contextmanager
def written_whole(call: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Within the context: where to write a file ``NAME.pt2`` that takes its place at the end, if nothing is raised.

    What was there before stays until then. It is looked at first whether the file can be written at all, since what
    goes into it may take minutes.

    Args:
        call: of the function this is for, as an error is to name it: ``save(program, path)``.

    Raises:
        ExportError: the path does not end in ``.pt2``.
        FileNotFoundError, IsADirectoryError, PermissionError: the folder is not there or cannot be written to, or the
            path is a folder.
    """
    target = _checked(call, path)
    work = _work_folder(call, target)
    with work:
        whole = Path(work.name) / target.name
        yield whole
        os.replace(whole, target)


def check_target(call: str, path: str | os.PathLike[str]) -> None:
    """Raise what ``written_whole`` would raise of the path now, and write nothing.

    For callers whose work begins long before they have something to write.
    """
    _work_folder(call, _checked(call, path)).cleanup()


def _checked(call: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ExportError(f"{call}: path is {str(path)!r}; expected one that ends in '.pt2'")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{call}: there is no folder {str(target.parent)!r} to write {target.name} to")
    if target.is_dir():
        raise IsADirectoryError(f"{call}: path {str(path)!r} is a folder; expected a file to write")
    return target


def _work_folder(call: str, target: Path) -> tempfile.TemporaryDirectory[str]:
    """In the target's folder, since a file can only be moved into place within one file system."""
    try:
        return tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent)
    except OSError as error:
        raise type(error)(f"{call}: {str(target.parent)!r} cannot be written to ({error.strerror})") from error
