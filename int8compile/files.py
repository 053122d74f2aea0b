"""Writes files atomically, complete or not at all: ``with replaced(target) as path: path.write_text(...)``.

A file is written in a folder of its own next to the target, synced to the disk, and then moved into place. So neither a
kill nor a power cut leaves half a file, and the old file stays until the move. A process that is killed leaves its
folder. The next process that writes next to it removes it; a lock, which ends with its process, marks folders in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from int8compile.errors import ExportError

#: of the names of those folders
WORK_FOLDER = ".int8compile-saving-"


@contextmanager
def replaced(target: Path, call: str = "") -> Iterator[Path]:
    """Within the context: where to write a file that takes the target's place at the end, if nothing is raised.

    Args:
        call: what is being done, as an error is to name it.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; the target is as it was.
    """
    with _work_folder(target.parent, call) as folder:
        whole = folder / target.name
        yield whole
        if target.exists():
            shutil.copymode(target, whole)
        _reaches_disk(whole)
        os.replace(whole, target)
    _reaches_disk(target.parent)


@contextmanager
def written_whole(call: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """``replaced`` for a file ``NAME.pt2`` that a user names.

    It is looked at first whether the file can be written at all, since what goes into it may take minutes. A link stays
    one: the file that it leads to is replaced.

    Args:
        call: of the function this is for, as an error is to name it: ``save(program, path)``.

    Raises:
        ExportError: the path does not end in ``.pt2``.
        FileNotFoundError, IsADirectoryError, PermissionError: the folder is not there or cannot be written to, or the
            path is a folder or a file that may not be written to.
    """
    with replaced(_checked(call, path), call) as whole:
        yield whole


def check_target(call: str, path: str | os.PathLike[str]) -> None:
    """Raise what ``written_whole`` would raise of the path now, and write nothing.

    For callers whose work begins long before they have something to write.
    """
    with _work_folder(_checked(call, path).parent, call):
        pass


def remove_left_over(parent: Path) -> None:
    """Remove what killed processes left in a folder, as far as that is allowed."""
    for folder in parent.glob(f"{WORK_FOLDER}*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _checked(call: str, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix != ".pt2":
        raise ExportError(f"{call}: path is {str(path)!r}; expected one that ends in '.pt2'")
    target = Path(os.path.realpath(target)) if target.is_symlink() else target
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{call}: there is no folder {str(target.parent)!r} to write {target.name} to")
    if target.is_dir():
        raise IsADirectoryError(f"{call}: path {str(path)!r} is a folder; expected a file to write")
    if target.exists() and not target.is_file():
        raise PermissionError(f"{call}: path {str(path)!r} is a device or the like; expected a file to write")
    # Moved into place, a file would take the place of one that is kept from being written to.
    if target.exists() and not (os.access(target, os.W_OK) and target.stat().st_mode & 0o222):
        raise PermissionError(f"{call}: the file {str(path)!r} is read-only; remove it, or let it be written to")
    return target


@contextmanager
def _work_folder(parent: Path, call: str) -> Iterator[Path]:
    """In the target's folder, since a file can only be moved into place within one file system."""
    remove_left_over(parent)
    try:
        folder, lock = _locked_folder(parent)
    except OSError as error:
        prefix = f"{call}: " if call else ""
        raise type(error)(f"{prefix}{str(parent)!r} cannot be written to ({error.strerror})") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=WORK_FOLDER, dir=parent))
        lock = -1
        try:
            lock = os.open(folder, os.O_RDONLY)
            with contextlib.suppress(OSError):  # a file system without locks, on which nothing is ever removed
                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(lock), folder.stat()):
                return folder, lock
        except FileNotFoundError:
            pass  # another process took it for one that was left, before it was locked
        if lock >= 0:
            os.close(lock)


def _reaches_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, would outlast a power cut."""
    file = os.open(path, os.O_RDONLY)
    try:
        if path.is_dir():
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(file)
        else:
            os.fsync(file)
    finally:
        os.close(file)
