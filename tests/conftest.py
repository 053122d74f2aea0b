"""Every test starts with no compiled code and an empty weight store."""

import logging
from collections.abc import Iterator

import pytest
import torch

from int8compile.weights import STORE

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
