"""``examples/tensor_parallel.py`` under torchrun, and what happens with a number of processes that it cannot have."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from checkout import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> str:
    import transformers

    folder = str(tmp_path_factory.mktemp("model"))
    config = transformers.LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.run(
        [*command, "-m", "examples.tensor_parallel", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )


def test_two_processes(model):
    done = torchrun(2, "--model", model, "--check")
    assert done.returncode == 0, done.stderr
    assert "in each of 2 processes: 14 of 15 linears" in done.stdout
    errors = [float(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("error against float")]
    alone, split = errors
    assert 0 < split < 1.5 * alone


def test_a_number_that_does_not_divide_the_heads(model):
    done = torchrun(3, "--model", model)
    assert done.returncode != 0
    assert "3 processes do not divide num_attention_heads=4" in " ".join(done.stderr.replace("│", " ").split())
