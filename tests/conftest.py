"""Every test starts with no compiled code and an empty weight store, and leaves the process as it found it."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from int8compile.weights.store import STORE

# What was tuned on this machine would change what the tests look at.
os.environ["INT8COMPILE_IGNORE_TUNED"] = "1"

# torch keeps this logger apart and silent. pytest puts its handler on loggers that do not propagate, which would
# switch on the tracing of every compile.
logging.getLogger("torch.__trace").propagate = True


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    STORE.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def settings() -> dict[str, Any]:
    """What a test could change for all that come after it in its process, and that would be hard to trace back."""
    return {
        "gradients": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "level of torch's log": logging.getLogger("torch").level,
        "level of torch.export's log": logging.getLogger("torch.export").level,
    }


@pytest.fixture(autouse=True)
def unchanged_settings() -> Iterator[None]:
    before = settings()
    yield
    after = settings()
    torch.set_grad_enabled(before["gradients"])  # so that it is this test that fails, and no other
    assert after == before
