"""Operators on DTensors, and int8 modules under tensor parallelism."""

from __future__ import annotations

import dtensor_operators
import pytest
import torch
from processes import run_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_operators_and_modules(world):
    run_processes(dtensor_operators.all_of_them, world)
