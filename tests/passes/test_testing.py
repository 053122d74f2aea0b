"""``int8compile.testing``: goldens are accepted into the source, and fail with what is different."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from torch import nn

from int8compile.errors import CaptureError
from int8compile.graph.dump import DUMP_VERSION
from int8compile.testing import assert_int8_graph, assert_int8_sites, assert_op_counts, trace

SUITE = ROOT / "examples" / "golden_suite" / "test_goldens.py"
X = torch.ones(2, 3)


def run(path: Path, *command: str, accept: bool = False) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "EXPECTTEST_ACCEPT"}
    environment |= {"EXPECTTEST_ACCEPT": "1"} if accept else {}
    return subprocess.run(
        [sys.executable, *command, str(path)],
        cwd=path.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_goldens_are_accepted_into_the_source_and_hold_from_then_on(tmp_path):
    """The example suite with its texts emptied is the example suite once accepted; under unittest too."""
    text = SUITE.read_text()
    emptied = re.sub(r'"""\\\n.*?"""', '""""""', text, flags=re.DOTALL)
    assert emptied.count('""""""') == 4
    path = tmp_path / "test_goldens.py"
    path.write_text(emptied)
    accepted = run(path, "-m", "pytest", "-q", "-p", "no:cacheprovider", accept=True)
    assert accepted.returncode == 0, accepted.stdout
    assert path.read_text() == text
    assert run(path).returncode == 0


def test_differences_are_shown():
    with pytest.raises(AssertionError, match=rf"-nothing\n\+# int8compile graph, version {DUMP_VERSION}\n"):
        assert_int8_graph(nn.Linear(3, 4), (X,), "nothing\n")
    with pytest.raises(AssertionError, match=r"\+1x .* 3 -> 4 float32 TOO_SMALL min_features=128"):
        assert_int8_sites(nn.Linear(3, 4), (X,), "nothing\n")
    with pytest.raises(AssertionError, match=r"expected {'aten.linear': 2}, found {'aten.linear': 1}; all calls: {'at"):
        assert_op_counts(nn.Linear(3, 4), (X,), {"aten.linear": 2})


def test_buffers_are_constants():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 3))

        def forward(self, x):
            return x @ self.weight.t()

    names = [node.meta.get("int8compile_constant") for node in trace(Scaled(), X).graph.find_nodes(op="placeholder")]
    assert names == [None, "weight"]


def test_what_cannot_be_traced_is_named():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CaptureError, match=r"Branching cannot be traced symbolically.*assert_int8_sites"):
        assert_int8_graph(Branching(), (X,), "")
