"""Inductor's caches across processes: hit when nothing changed, missed when anything that decides the result did."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

import int8compile.passes

# Compiles and runs a small model for each run that it is given, each in a process of its own. They are forked from one
# that has imported torch, and nothing of ours, which saves them most of their time.
SCRIPT = """
    import json, os, sys
    import torch, torch._dynamo, torch._inductor.compile_fx
    from torch import nn
    from torch._dynamo.utils import counters

    def run(path, seed, options):
        sys.path[:0] = [path] if path else []
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        x = torch.randn(5, 16)
        with torch.no_grad():
            out = torch.compile(model, backend="int8", options={"min_features": 0, **options})(x)
        import int8compile
        from int8compile.ops import linear, quantize_weight
        assert not path or int8compile.__file__.startswith(path)
        threshold = options.get("llm_int8_threshold", 6.0)
        want = x
        with torch.no_grad():
            for layer in model:
                is_linear = isinstance(layer, nn.Linear)
                want = linear(want, *quantize_weight(layer.weight), layer.bias, threshold) if is_linear else layer(want)
        return {
            "error": ((out - want).norm() / want.norm()).item(),
            "hits": counters["aot_autograd"]["autograd_cache_hit"],
            "misses": counters["aot_autograd"]["autograd_cache_miss"],
            "rewritten": int8compile.last_report().rewritten,
        }

    for arguments in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            print(json.dumps(run(*arguments)), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def compile_in_processes(cache: Path, *runs: tuple[Path | None, int, dict[str, Any]], **env: str) -> list[str]:
    """What each run found in inductor's caches, which are in ``cache``: ``hit``, ``miss``, or nothing.

    A run is the folder that the package is in (None: the installed one), the seed of its weights, and its options.
    """
    script = textwrap.dedent(SCRIPT)
    arguments = json.dumps([(path and str(path), *rest) for path, *rest in runs])
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1", **env}
    command = [sys.executable, "-c", script, arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=cache)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["rewritten"] for result in results] == [2] * len(runs)
    assert max(result["error"] for result in results) < 1e-5
    assert all(result["hits"] + result["misses"] <= 1 for result in results)
    return ["hit" if result["hits"] else "miss" if result["misses"] else "" for result in results]


def package_copy(folder: Path) -> Path:
    """A folder with a copy of the installed package."""
    installed = Path(int8compile.passes.__file__).parent
    package = installed.parent if installed.parent.name == "int8compile" else installed.parent / "int8compile"
    shutil.copytree(package, folder / "int8compile")
    if not (folder / "int8compile" / "passes").exists():
        for name in ("passes", "csrc"):
            shutil.copytree(package.parent / name, folder / "int8compile" / name)
    return folder


def test_processes_share_what_is_the_same_and_nothing_else(tmp_path):
    """A process with other weights hits, and uses its own; one with another option or another source does not."""
    cache, same, changed = tmp_path / "cache", package_copy(tmp_path / "same"), package_copy(tmp_path / "changed")
    cache.mkdir()
    with (changed / "int8compile" / "ops" / "linear.py").open("a") as source:
        source.write("# new\n")
    runs = [
        ((None, 0, {}), "miss"),
        ((None, 1, {}), "hit"),
        ((None, 0, {"llm_int8_threshold": 3.0}), "miss"),
        ((same, 0, {}), "hit"),  # the copy alone must not make a difference
        ((changed, 0, {}), "miss"),
    ]
    assert compile_in_processes(cache, *(run for run, _ in runs)) == [found for _, found in runs]


@pytest.mark.slow
def test_without_caches(tmp_path):
    assert compile_in_processes(tmp_path, (None, 0, {}), TORCHINDUCTOR_FORCE_DISABLE_CACHES="1") == [""]
