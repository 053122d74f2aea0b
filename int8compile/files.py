"""Writes files atomically, complete or not at all: ``with replaced(target) as path: path.write_text(...)``.

A file is written in a folder of its own next to the target, synced to the disk, and then moved into place. So neither a
kill nor a power cut leaves half a file, and the old file stays until the move. A process that is killed leaves its
folder. The next process that writes next to it removes it; a lock, which ends with its process, marks folders in use.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock

from int8compile.errors import ExportError

#: of the names of those folders
WORK_FOLDER = ".int8compile-saving-"
#: in a folder that is being written to
LOCK = ".int8compile-lock"


@contextmanager
def replaced(target: Path, call: str = "", mode: int | None = None) -> Iterator[Path]:
    """Within the context: where to write a file that takes the target's place at the end, if nothing is raised.

    Args:
        call: what is being done, as an error is to name it.
        mode: the file's permissions. By default those of the file that is there, or what a new one has.

    Raises:
        OSError: the folder cannot be written to, or the disk is full; the target is as it was.
    """
    with _work_folder(target.parent, call) as folder:
        whole = folder / target.name
        yield whole
        if mode is not None:
            whole.chmod(mode)
        elif target.exists():
            shutil.copymode(target, whole)
        reach_disk(whole)
        os.replace(whole, target)
    reach_disk(target.parent)


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
        if not folder.is_symlink():
            with contextlib.suppress(filelock.Timeout), held(folder / LOCK) as alone:
                if alone:
                    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Hold a lock file, which is removed at the end; False where there can be none (read-only, NFS without locks).

    Raises:
        filelock.Timeout: another process, or another thread, holds it.
    """
    try:
        lock = filelock.FileLock(str(path), mode=0o600, blocking=False)  # nobody else's
        lock.acquire()
        locked = True
    except filelock.Timeout:
        raise
    except (OSError, NotImplementedError):
        locked = False
    if locked and not path.exists():  # whoever held it has removed it since it was opened here
        lock.release()
        raise filelock.Timeout(str(path))
    try:
        yield locked
    finally:
        if locked:
            with contextlib.suppress(OSError):
                path.unlink()
            lock.release()


def reach_disk(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, would outlast a power cut."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError:
        if not path.is_dir():  # not every file system can for folders, and Windows does not open them
            raise


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
    with ExitStack() as stack:
        yield _locked_folder(parent, call, stack)


def _locked_folder(parent: Path, call: str, stack: ExitStack) -> Path:
    """A new folder, locked and there until the stack is closed."""
    while True:
        try:
            folder = Path(tempfile.mkdtemp(prefix=WORK_FOLDER, dir=parent))
        except OSError as error:
            prefix = f"{call}: " if call else ""
            raise type(error)(f"{prefix}{str(parent)!r} cannot be written to ({error.strerror})") from error
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Until it is locked, another process may take it for one that was left.
        with contextlib.suppress(filelock.Timeout):
            stack.enter_context(held(folder / LOCK))
            if folder.is_dir():
                return folder
