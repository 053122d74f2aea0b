"""``release_weights=True``: memory really goes down, and touching a freed weight is an error that says so."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from compiling import compile_eager, int8_linear
from torch import nn

import int8compile

MEMORY = """
    import ctypes, gc, json, threading, time, psutil, torch
    from torch import nn
    import int8compile
    from int8compile.weights.store import STORE

    process = psutil.Process()
    def rss():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back, or it counts as ours
        return process.memory_info().rss

    class Model(nn.Module):
        def __init__(self, width, layers):
            super().__init__()
            self.embedding = nn.Embedding(1000, width)
            self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        def forward(self, tokens):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = torch.nn.functional.normalize(layer(x))
            return x

    tokens = torch.arange(4)
    def compiled(model):
        return torch.compile(model, backend="int8", options={"release_weights": True})

    with torch.no_grad():
        # What compiling such a model leaves behind (modules, graphs, guards) is there before the measurement begins.
        compiled(Model(128, 24))(tokens)
        torch._dynamo.reset(); gc.collect()
        base = rss()
        model = Model(2048, 24)                       # 384 MiB of float linears, 8 MiB of embedding
        loaded = rss() - base
        call = compiled(model)
        peak, stop = [0], threading.Event()
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], process.memory_info().rss - base)
                time.sleep(0.002)
        watcher = threading.Thread(target=watch); watcher.start()
        first = call(tokens); stop.set(); watcher.join()
        second = call(tokens)
    floats = sum(p.numel() * 4 for layer in model.layers for p in layer.parameters())
    print(json.dumps({
        "same": torch.equal(first, second), "loaded": loaded, "peak": peak[0], "steady": rss() - base,
        "floats": floats, "embedding": model.embedding.weight.numel() * 4, "store": STORE.nbytes(),
        "largest": 2048 * 2048 * 4,
    }))
"""


@pytest.mark.slow  # processes of their own, each with a model to compile
def test_memory_of_a_process():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    m = json.loads(done.stdout.splitlines()[-1])
    assert m["same"]
    assert m["store"] == 24 * (2048 * 2048 + 4 * 2048)
    assert m["loaded"] > 0.95 * (m["floats"] + m["embedding"])
    # Steady: int8 weights, scales and what stays float, within 5 % and the allocator's few megabytes.
    assert m["steady"] < 1.05 * (m["store"] + m["embedding"]) + 8e6
    # Peak: the float model, one weight in int8, and the working memory of one slice and of compiling.
    assert m["peak"] < 1.05 * (m["loaded"] + m["largest"]) + 48e6


@pytest.fixture
def released():
    """A model whose float weights are gone, its input, its int8 output, and a copy of its weight."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)), torch.randn(4, 16)
    weight = model[0].weight.detach().clone()
    with torch.no_grad():
        call = compile_eager(model, release_weights=True)
        out = call(x)
        assert torch.equal(out, int8_linear(x, weight, model[0].bias))
        yield model, call, x, weight


def test_compiled_calls_go_on(released):
    model, call, x, weight = released
    for rows in (4, 7, 9):
        y = torch.randn(rows, 16)
        assert torch.equal(call(y), int8_linear(y, weight, model[0].bias))
    torch._dynamo.reset()  # a later recompile finds the int8 form
    assert torch.equal(call(x), int8_linear(x, weight, model[0].bias))


@pytest.mark.parametrize(
    "touch",
    [
        lambda model, x: model(x),
        lambda model, x: model[0].weight.clone(),
        lambda model, x: model[0].weight + 1,
        lambda model, x: model[0].weight.numpy(),
        lambda model, x: repr(model[0].weight),
        lambda model, x: model.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()}),
        lambda model, x: model.half(),
        lambda model, x: torch.save(model.state_dict(), "/dev/null"),
    ],
)
def test_touching_a_freed_weight_is_a_clear_error(released, touch):
    model, _, x, _ = released
    with pytest.raises(RuntimeError, match=r"freed by release_weights=True.*restore_weights_\(model\)"):
        touch(model, x)


def test_restore_weights_gives_the_int8_values_as_floats(released):
    model, call, x, weight = released
    out = call(x)
    assert int8compile.restore_weights_(model) == 1
    scale = weight.abs().amax(1, keepdim=True) / 127
    assert ((model[0].weight - weight).abs() <= 0.501 * scale).all()
    assert int8compile.restore_weights_(model) == 0
    torch.testing.assert_close(call(x), out)


def test_a_new_weight_takes_the_freed_ones_place(released):
    model, call, x, _ = released
    fresh = torch.randn(8, 16)
    model[0].weight = nn.Parameter(fresh.clone())
    assert torch.equal(call(x), int8_linear(x, fresh, model[0].bias))


def test_a_weight_read_in_both_orders_is_freed_after_both():
    """As of an autoencoder whose decoder has the encoder's weight."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 16), requires_grad=False)

        def forward(self, x):
            return nn.functional.linear(x, self.weight).relu() @ self.weight

    model, x = Tied(), torch.randn(3, 16)
    want = model(x)
    call = compile_eager(model, release_weights=True)
    out = call(x)
    torch.testing.assert_close(out, want, rtol=0.05, atol=0.5)
    with pytest.raises(RuntimeError, match="freed by release_weights"):
        model.weight.sum()
    assert torch.equal(call(x), out)


def test_what_the_graph_reads_as_float_or_shares_storage_is_kept():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(16, 16)
            self.tied = nn.Linear(16, 16, bias=False)
            self.tied.weight = self.embedding.weight
            both = torch.randn(16, 16)
            self.first, self.second = nn.Linear(16, 8, bias=False), nn.Linear(16, 8, bias=False)
            self.first.weight, self.second.weight = nn.Parameter(both[:8]), nn.Parameter(both[8:])

        def forward(self, tokens):
            x = self.tied(self.embedding(tokens))
            return self.first(x) + self.second(x)

    model = Shared()
    with torch.no_grad():
        compile_eager(model, release_weights=True, skip_output_embeddings=False)(torch.arange(4))
        assert int8compile.last_report().rewritten == 3
        model(torch.arange(4))
