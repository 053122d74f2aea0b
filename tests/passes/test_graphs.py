"""``verify`` finds every breach, and a graph's text is the same everywhere."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from checkout import HELPERS
from torch import nn
from tracing import rewrite

from int8compile.errors import VerifyError
from int8compile.graph.capture import FloatWeight, mark_constant_as
from int8compile.ops import linear
from int8compile.passes import verify


class TestVerify:
    def test_each_breach_is_found(self):
        """(1) a dead int8 call (2) a weight that is no lifted pair (3) a wrong shape (4) a float weight left behind"""

        def dead(graph, call):
            graph.output_node().args = ((),)

        def swapped(graph, call):
            call.args = (call.args[0], call.args[1], call.args[1], *call.args[3:])

        def reshaped(graph, call):
            call.meta["val"] = call.meta["val"][:1]

        def left_behind(graph, call):
            with graph.inserting_before(call):
                mark_constant_as(graph.placeholder("left"), "left")
            lifted = next(iter(captured.lifted.values()))
            left = next(n for n in graph.nodes if n.name == "left")
            captured.lifted[lifted.sources] = dataclasses.replace(lifted, sources=(FloatWeight(left, False),))

        for breach, message in (
            (dead, "is dead"),
            (swapped, r"is \[3, 4\] where|expected float32|not a lifted pair"),
            (reshaped, r"is \[1, 4\] where its operator gives \[2, 4\]"),
            (left_behind, "float weight left is left behind"),
        ):
            captured, context = rewrite(nn.Linear(3, 4, bias=False), torch.ones(2, 3), upto="merge")
            breach(captured.graph, captured.graph.find_nodes(op="call_function", target=linear)[0])
            with pytest.raises((VerifyError, ValueError), match=message):
                verify(captured.graph, context)


class TestDump:
    def test_same_text_in_every_run_and_under_every_hash_seed(self):
        script = (
            "import torch; from torch import nn; from tracing import golden\n"
            "class M(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.q, self.k = nn.Linear(3, 4), nn.Linear(3, 5)\n"
            "        self.requires_grad_(False)\n"
            "    def forward(self, x): return self.q(x), self.k(x), {'s': x[..., :1], 'f': x.float()}\n"
            "text = golden(M(), torch.ones(2, 3), dynamic=True, llm_int8_skip_modules={'a', 'b', 'c'})\n"
        )
        here: dict[str, str] = {}
        exec(script, here)
        assert "int8compile.linear" in here["text"]
        done = subprocess.run(
            [sys.executable, "-c", script + "print(text)"],
            env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(HELPERS)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == here["text"] + "\n"
