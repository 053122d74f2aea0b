"""Tensor parallelism by DTensors: in several processes, each linear runs in int8 on its shard."""

from __future__ import annotations

import pytest
import tensor_parallel
import torch
from processes import run_processes

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def test_linears_run_on_their_shards():
    run_processes(tensor_parallel.the_essentials, 2)


@pytest.mark.slow
def test_a_process_that_dies():
    run_processes(tensor_parallel.a_process_dies, 2)


@pytest.mark.slow
def test_through_inductor():
    run_processes(tensor_parallel.through_inductor, 2)


@pytest.mark.slow
@pytest.mark.parametrize("body", [tensor_parallel.the_essentials, tensor_parallel.the_rest])
def test_in_four_processes(body):
    run_processes(body, 4)
