"""Models under ``DistributedDataParallel``, whose gradient buckets split a graph into parts, and under FSDP2."""

from __future__ import annotations

import os
import subprocess
import sys

import data_parallel
import pytest
import torch
from processes import run_processes

needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")

SCRIPT = """
import sys, tempfile
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
import int8compile

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(5))
        self.gain = nn.Parameter(torch.ones(512))
    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() * self.gain
        return x

store = distributed.FileStore(tempfile.mktemp(), 1)
distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
model = Net()
frozen = sys.argv[1] == "frozen"
if frozen:
    for layer in model.layers:
        layer.requires_grad_(False)
        layer.bias.requires_grad_(True)
whole = DistributedDataParallel(model, bucket_cap_mb=1)
compiled = torch.compile(whole, backend="int8")
x = torch.randn(3, 512)
with torch.set_grad_enabled(frozen):
    for _ in range(2):
        out, want = compiled(x), model(x)
        error = float((out - want).norm() / want.norm())
        assert 0 < error < 0.05, error
    if frozen:
        out.sum().backward()
        assert model.gain.grad.norm() > 0
report = int8compile.last_report()
print(report.summary(), len(report.graphs), report.recompiles)
distributed.destroy_process_group()
"""


@needs_gloo
@pytest.mark.parametrize(("which", "parts"), [("inference", 5), ("frozen", 1)])
def test_every_part_runs_in_int8(which, parts):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, which],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"5 of 5 linears {parts} 0"


@needs_gloo
def test_fsdp():
    run_processes(data_parallel.fully_sharded, 2)


@needs_gloo
def test_weights_that_fsdp_gathers_may_be_passed_on():
    run_processes(data_parallel.weights_passed_on, 1)


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    "body", [data_parallel.fully_sharded, data_parallel.fully_sharded_int8, data_parallel.replicated]
)
def test_four_processes(body):
    run_processes(body, 4)
