"""Every test starts with no compiled code and an empty weight store."""

from collections.abc import Iterator

import pytest
import torch

from int8compile.weights import STORE


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    STORE.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
