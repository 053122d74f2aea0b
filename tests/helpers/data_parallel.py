"""What tests of data parallelism run in each process."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from compiling import compile_eager
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import int8compile
from int8compile.integrations.dtensor import shardable_
from int8compile.report import Reason
from int8compile.weights.store import STORE

WIDTH = 64


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.up(x).relu())
        return out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sharded(model: nn.Module, reshard: bool) -> Any:
    """A copy under FSDP2, each layer gathered by itself."""
    model = copy.deepcopy(model)
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, reshard_after_forward=reshard)
    return fully_shard(model, reshard_after_forward=reshard)


def equal(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def all_rewritten() -> None:
    report = int8compile.last_report()
    assert report is not None
    assert {site.reason for site in report.sites} == {Reason.REWRITTEN}


@torch.no_grad()
def fully_sharded(rank: int, world: int) -> None:
    """The results of one process to the bit, after writes to a row of a shard too, of which nothing tells."""
    model, x = Net().eval(), torch.randn(world, 5, WIDTH)[rank]
    alone = compile_eager(model)
    for reshard in (True, False):
        torch._dynamo.reset()
        whole = sharded(model, reshard)
        compiled = compile_eager(whole)
        for _ in range(2):
            equal(compiled(x), alone(x))
        all_rewritten()
        for factor in (3, 1 / 3):
            for layer in (*whole.layers, whole):
                layer.reshard()
            whole.layers[0].up.weight.to_local()[1].mul_(factor)
            rows = 2 * WIDTH // world
            model.layers[0].up.weight[1::rows].mul_(factor)  # type: ignore[union-attr,operator,index]
            equal(compiled(x), alone(x))
        torch._dynamo.reset()
        STORE.clear()
        compiled(x)
        assert len(STORE) == 0, "an int8 model in each process would undo the sharding"


@torch.no_grad()
def fully_sharded_int8(rank: int, world: int) -> None:
    """Int8 modules: what one process gives, eager and compiled, with a byte a weight in the shards."""
    model, x = Net().eval(), torch.randn(world, 5, WIDTH)[rank]
    int8compile.quantize_(model, {"min_features": 0})
    whole = copy.deepcopy(model)
    assert shardable_(whole) == 4
    assert shardable_(whole) == 0
    assert whole.half().layers[0].up.weight_scale.dtype == torch.float32  # type: ignore[union-attr,index]
    whole = copy.deepcopy(model)
    shardable_(whole)
    for reshard in (True, False):
        torch._dynamo.reset()
        split = sharded(whole, reshard)
        held = [p.to_local() for p in split.parameters() if p.dtype == torch.int8]
        assert sum(p.numel() for p in held) == 4 * 2 * WIDTH * WIDTH // world
        equal(split(x), model(x))
        compiled = compile_eager(split)
        for _ in range(2):
            equal(compiled(x), model(x))
    report = int8compile.last_report()
    assert report is not None
    assert {site.reason for site in report.sites} == {Reason.PREQUANTIZED}


def replicated(rank: int, world: int) -> None:
    """One process's results, and gradients of what trains are averaged."""
    model, x = Net(), torch.randn(world, 5, WIDTH)[rank]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    alone = compile_eager(copy.deepcopy(model))
    whole = DistributedDataParallel(copy.deepcopy(model))
    compiled = compile_eager(whole)
    out, want = compiled(x), alone(x)
    equal(out, want)
    all_rewritten()
    out.square().sum().backward()
    other = copy.deepcopy(model)
    each = compile_eager(other)
    torch.stack([each(part).square().sum() for part in _parts(world)]).mean().backward()
    for ours, theirs in zip(whole.module.parameters(), other.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)


def _parts(world: int) -> torch.Tensor:
    torch.manual_seed(0)
    Net()
    return torch.randn(world, 5, WIDTH)


class Passing(nn.Module):
    """Gives its weights to a compiled function as arguments, of which Dynamo does not say that they are FSDP's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.product = compile_eager(lambda weights, x: F.linear(F.linear(x, weights[0]).relu(), weights[1]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.product([self.up.weight, self.down.weight], x)
        return out


@torch.no_grad()
def weights_passed_on(rank: int, world: int) -> None:
    """What FSDP gathers is quantised anew whatever way a graph is given it."""
    x = torch.randn(5, WIDTH)
    for reshard in (True, False):
        torch._dynamo.reset()
        model = Passing().eval()
        plain = Passing().eval()
        plain.load_state_dict(model.state_dict())
        model = fully_shard(model, reshard_after_forward=reshard)
        for row in range(4):
            equal(model(x), plain(x))
            model.unshard()  # type: ignore[operator]
            model.up.weight.data[row].mul_(-3)  # type: ignore[index] # as the next gathering writes, uncounted
            plain.up.weight[row].mul_(-3)
            equal(model(x), plain(x))
            model.reshard()  # type: ignore[operator]
            plain.up.weight[row].div_(-3)
        all_rewritten()
