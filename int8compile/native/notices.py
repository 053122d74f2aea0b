"""Messages to the user about native kernels, each once a process."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("int8compile.native")


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, unless it was logged before."""
    log.warning(message)
