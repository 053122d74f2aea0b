"""transformers' plans for tensor parallelism: compiled models, and int8 ones."""

from __future__ import annotations

import pytest
import torch
import transformers_parallel
from processes import run_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("body", [transformers_parallel.compiled_models, transformers_parallel.int8_models])
def test_models(body, world, tmp_path):
    run_processes(body, world, str(tmp_path))
