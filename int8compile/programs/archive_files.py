"""A file for torch's writer of archives, which would end the process if a write failed.

torch reports a full disk as an error, and again in a C++ destructor while it handles that error, where errors are not
allowed: the process is aborted. So a write to this file never fails. After an error further writes do nothing, and the
error is raised at the end. Ctrl-C is treated in the same way, since Python would raise it inside of a write.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

_STOPPING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def archive_file(path: Path, call: str) -> Iterator[IO[bytes]]:
    """Within the context: a file to hand to torch in place of the path.

    Args:
        call: what is being done, as an error is to name it.

    Raises:
        OSError: it could not be written, whatever torch made of that.
    """
    file = ArchiveFile(path)
    try:
        yield cast(IO[bytes], file)
    except Exception:
        if file.problem is None and file.stopped is None:
            raise
    finally:
        file.end()
    if file.stopped is not None:
        signal.raise_signal(file.stopped)
    if isinstance(file.problem, OSError):
        number, text = file.problem.errno, file.problem.strerror
        raise OSError(number, f"{call}: {path.name} cannot be written: {text}") from file.problem
    if file.problem is not None:
        raise file.problem


class ArchiveFile(io.RawIOBase):
    """See above.

    Attributes:
        problem: what the first write that failed raised.
        stopped: the signal that came meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._handlers: dict[signal.Signals, Any] = {}
        self.problem: BaseException | None = None
        self.stopped: int | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """torch goes back to the start when it is done, for whoever reads; nobody does."""
        return 0

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        if self.problem is None and self.stopped is None:
            try:
                self._hold_signals()
                self._file.write(data)
            except BaseException as error:
                self.problem = error
        return size

    def end(self) -> None:
        """Close the file, and let signals through again."""
        try:
            self._file.close()
        except OSError as error:
            self.problem = self.problem or error
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _hold_signals(self) -> None:
        """From the first write on; compiling, which comes before, can be stopped as ever."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            return
        for number in _STOPPING:
            handler = signal.getsignal(number)
            if handler is not None and handler != signal.SIG_IGN:  # None: not Python's own
                self._handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = number
