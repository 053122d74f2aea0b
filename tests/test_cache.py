"""Inductor's caches across processes: hit when nothing changed, missed when anything that decides the result did."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import int8compile.passes

SCRIPT = """
    import json, sys, torch
    from torch import nn
    seed, options = int(sys.argv[1]), json.loads(sys.argv[2])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    x = torch.randn(5, 16)
    with torch.no_grad():
        out = torch.compile(model, backend="int8", options={"min_features": 0, **options})(x)
    import int8compile
    from int8compile.ops import linear, quantize_weight
    threshold = options.get("llm_int8_threshold", 6.0)
    want = x
    with torch.no_grad():
        for layer in model:
            is_linear = isinstance(layer, nn.Linear)
            want = linear(want, *quantize_weight(layer.weight), layer.bias, threshold) if is_linear else layer(want)
    from torch._dynamo.utils import counters
    print(json.dumps({
        "error": ((out - want).norm() / want.norm()).item(),
        "hits": counters["aot_autograd"]["autograd_cache_hit"],
        "misses": counters["aot_autograd"]["autograd_cache_miss"],
        "rewritten": int8compile.last_report().rewritten,
    }))
"""


def run(cache: Path, seed: int = 0, path: Path | None = None, **options: object) -> dict[str, float]:
    """Compile and run a small model in a process of its own, whose inductor caches are in ``cache``."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    if path is not None:
        env["PYTHONPATH"] = str(path)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(seed), json.dumps(options)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=cache)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["rewritten"] == 2
    assert result["error"] < 1e-5
    return result


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the graph with default options."""
    cache = tmp_path_factory.mktemp("inductor")
    assert run(cache)["misses"] == 1
    return cache


def test_a_second_process_hits_and_uses_its_own_weights(warm):
    result = run(warm, seed=1)
    assert (result["hits"], result["misses"]) == (1, 0)


def test_another_option_misses(warm):
    assert run(warm, llm_int8_threshold=3.0)["misses"] == 1


def test_another_source_misses(warm, tmp_path):
    """A copy of the installed package in which one comment is new."""
    installed = Path(int8compile.passes.__file__).parent
    package = installed.parent if installed.parent.name == "int8compile" else installed.parent / "int8compile"
    shutil.copytree(package, tmp_path / "int8compile")
    if not (tmp_path / "int8compile" / "passes").exists():
        for name in ("passes", "csrc"):
            shutil.copytree(package.parent / name, tmp_path / "int8compile" / name)
    assert run(warm, path=tmp_path)["hits"] == 1, "the copy alone must not make a difference"
    with (tmp_path / "int8compile" / "ops" / "linear.py").open("a") as source:
        source.write("# new\n")
    assert run(warm, path=tmp_path)["misses"] == 1


def test_cold_and_without_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    result = run(tmp_path)
    assert (result["hits"], result["misses"]) == (0, 0)
