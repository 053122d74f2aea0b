"""What tests of tensor parallelism run in each process."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiling import compile_eager, int8_linear
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import int8compile
from int8compile.report import Reason, Report
from int8compile.weights.store import STORE

WIDTH = 64
OPTIONS: tuple[dict[str, Any], ...] = (
    {"min_features": WIDTH},
    {"outlier_policy": "element"},
    {"activation": "float"},
    {"llm_int8_threshold": 0},
    {"disable_passes": ["merge"]},
)


class Block(nn.Module):
    """A transformer's block in small, without the softmax, which would tell heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        x = x + self.o(self.q(h).sigmoid() * self.k(h) + self.v(h))
        out: torch.Tensor = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Linear(nn.Module):
    """A linear with outlier features, and what is right for it in one process."""

    def __init__(self, k: int = 2 * WIDTH, n: int = WIDTH) -> None:
        super().__init__()
        self.fc = nn.Linear(k, n)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc(x)
        return out


def outlying(*shape: int) -> torch.Tensor:
    """Activations of which one feature in 32 has outliers."""
    x = torch.randn(shape)
    x[..., 3::32] *= 20
    return x


def megatron(mesh: DeviceMesh, model: nn.Module, **column: Any) -> nn.Module:
    """A copy under the plan of Megatron: column-wise, then row-wise, with one all-reduce for each."""
    plan: dict[str, Any] = {name: ColwiseParallel(**column) for name in ("q", "k", "v", "gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("o", "down")}
    return parallelize_module(copy.deepcopy(model), mesh, plan)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def sites(report: Report | None) -> list[tuple[Any, ...]]:
    assert report is not None
    return [(site.path, site.in_features, site.out_features, site.reason) for site in report.sites]


@torch.no_grad()
def every_linear_runs_on_its_shard(rank: int, world: int, thorough: bool) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model, x = Block().eval(), outlying(3, 5, WIDTH)
    want = model(x)
    for options in OPTIONS if thorough else OPTIONS[:1]:
        torch._dynamo.reset()  # else Dynamo's limit of graphs for one function would leave the last ones eager
        alone = compile_eager(model, **options)
        noise = relative(alone(x), want)
        expected = sites(int8compile.last_report())
        assert {reason for *_, reason in expected} == {Reason.REWRITTEN}
        compiled = compile_eager(megatron(mesh, model), **options)
        error = relative(compiled(x), want)
        assert 0 < error < 1.5 * noise + 1e-6, (options, error, noise)
        other = outlying(7, 2, WIDTH)  # which Dynamo compiles with symbolic sizes
        assert 0 < relative(compiled(other), model(other)) < 1.5 * noise + 1e-6
        report = int8compile.last_report()
        assert report is not None
        assert sites(report) == expected
        assert all(
            f"shard {WIDTH // world} x" in s.detail or f"x {WIDTH // world}" in s.detail for s in report.sites[:4]
        )
        assert report.recompiles == 1
        joined = report.graphs[0].pass_counts
        assert joined.get("merge", joined["share"]) == 5, "q, k, v and gate, up"
        weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2)
        held = sum(use.int8_bytes for use in report.graphs[0].weights)
        assert weights / world < held < 1.2 * weights / world + 4 * 7 * 2 * WIDTH


@torch.no_grad()
def shards_quantise_their_own_slice(rank: int, world: int) -> None:
    """Column-wise to the bit what one process gives; row-wise the sum of int8 products of slices."""
    mesh = init_device_mesh("cpu", (world,))
    model, x = Linear().eval(), outlying(7, 2 * WIDTH)
    alone = compile_eager(model)(x)
    columns = parallelize_module(copy.deepcopy(model), mesh, {"fc": ColwiseParallel(output_layouts=Replicate())})
    torch.testing.assert_close(compile_eager(columns)(x), alone, rtol=0, atol=0)
    rows = parallelize_module(copy.deepcopy(model), mesh, {"fc": RowwiseParallel(input_layouts=Replicate())})
    slices = zip(x.chunk(world, -1), model.fc.weight.chunk(world, 1), strict=True)
    expected = sum(int8_linear(part, weight, None) for part, weight in slices) + model.fc.bias
    torch.testing.assert_close(compile_eager(rows)(x), expected)


@torch.no_grad()
def writes_are_seen(rank: int, world: int) -> None:
    """To the DTensor, to its shard, past PyTorch's counting, by an optimiser, and a new Parameter."""
    mesh = init_device_mesh("cpu", (world,))
    model, x = Linear().eval(), outlying(7, 2 * WIDTH)
    split = parallelize_module(model, mesh, {"fc": ColwiseParallel(output_layouts=Replicate())})
    assert isinstance(split, Linear)
    compiled = compile_eager(split)

    def step() -> None:
        weight = split.fc.weight
        weight.grad = torch.ones_like(weight)
        torch.optim.AdamW([weight], lr=0.5, fused=True).step()

    def replace() -> None:
        full = split.fc.weight.full_tensor()  # type: ignore[attr-defined]
        split.fc.weight = nn.Parameter(distribute_tensor(full * 2, mesh, [Shard(0)]))

    def load() -> None:
        split.load_state_dict({name: value * 0.5 for name, value in split.state_dict().items()})

    # Of rows that no sample of the weight's bytes sees, where PyTorch counts a write.
    row = torch.zeros(WIDTH, 2 * WIDTH)
    row[:: WIDTH // world] = 5
    changes: list[Callable[[], object]] = [
        lambda: split.fc.weight.add_(distribute_tensor(row, mesh, [Shard(0)])),
        lambda: split.fc.weight.to_local()[:1].mul_(-1),  # type: ignore[operator,attr-defined]
        lambda: split.fc.weight.data.mul_(3),
        step,
        replace,
        load,
    ]
    entries = None
    for change in changes:
        first = compiled(x)
        int8_form = [entry.int8_weight.weight for entry in STORE._entries.values()]
        torch.testing.assert_close(compiled(x), first, rtol=0, atol=0)
        assert all(a is b.int8_weight.weight for a, b in zip(int8_form, STORE._entries.values(), strict=True))
        change()
        after = compiled(x)
        full = split.fc.weight.full_tensor()  # type: ignore[attr-defined]
        expected = int8_linear(x, full, split.fc.bias.full_tensor())  # type: ignore[attr-defined]
        torch.testing.assert_close(after, expected, rtol=0, atol=0)
        assert relative(after, first) > 0.1
        assert entries in (None, len(STORE))
        entries = len(STORE)


@torch.no_grad()
def sequences_may_be_sharded(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model, x = Block().eval(), torch.randn(2, 4 * world, WIDTH)
    plan: dict[str, Any] = {name: ColwiseParallel(input_layouts=Shard(1)) for name in ("q", "k", "v", "gate", "up")}
    plan |= {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("o", "down")} | {"norm": SequenceParallel()}
    compiled = compile_eager(parallelize_module(copy.deepcopy(model), mesh, plan))
    part = compiled(x.chunk(world, 1)[rank].contiguous())
    parts = [torch.empty_like(part) for _ in range(world)]
    distributed.all_gather(parts, part.contiguous())
    noise = relative(compile_eager(model)(x), model(x))
    assert relative(torch.cat(parts, 1), model(x)) < 1.5 * noise
    compiled(x.chunk(world, 1)[rank].contiguous())
    assert {reason for *_, reason in sites(int8compile.last_report())} == {Reason.REWRITTEN}


def the_rest_stays_float(rank: int, world: int) -> None:
    """Rows of x in several processes under the column policy; gradients; layouts that are none of a linear's."""
    mesh = init_device_mesh("cpu", (world,))
    x = torch.randn(2 * world, 2 * WIDTH)

    def run(weight: list[Any], of_x: list[Any], train: str = "", n: int = WIDTH, **options: Any) -> tuple[Reason, str]:
        model = Linear(n=n).requires_grad_(False)
        for name in ("weight", "bias"):
            value = getattr(model.fc, name)
            layout = weight if name == "weight" else [Shard(0) if weight == [Shard(0)] else Replicate()]
            setattr(model.fc, name, nn.Parameter(distribute_tensor(value, mesh, layout), requires_grad=name == train))
        given = distribute_tensor(x, mesh, of_x)
        torch._dynamo.reset()
        compiled = compile_eager(model, **options)
        out = compiled(given)
        assert isinstance(out, DTensor)
        want = F.linear(x, model.fc.weight.full_tensor(), model.fc.bias.full_tensor())  # type: ignore[attr-defined]
        report = int8compile.last_report()
        assert report is not None
        (site,) = report.sites
        error = relative(out.full_tensor(), want)
        assert (1e-4 < error < 0.05) if site.rewritten else error < 1e-5
        return site.reason, site.detail

    rows = "rows of x in several processes; outlier_policy='element' takes them"
    assert run([Replicate()], [Shard(0)]) == (Reason.SHARDED, rows)
    assert run([Replicate()], [Shard(0)], outlier_policy="element")[0] is Reason.REWRITTEN
    assert run([Replicate()], [Shard(0)], llm_int8_threshold=0)[0] is Reason.REWRITTEN
    assert run([Replicate()], [Replicate()])[0] is Reason.REWRITTEN
    assert run([Shard(0)], [Replicate()], train="bias") == (Reason.SHARDED, "gradients")
    assert run([Shard(0)], [Replicate()], train="weight")[0] is Reason.TRAINABLE
    unequal = f"{WIDTH + 1} features in {world} unequal parts"
    assert run([Shard(0)], [Replicate()], n=WIDTH + 1) == (Reason.SHARDED, unequal)
    assert run([Shard(1)], [Replicate()])[0] is Reason.SHARDED
    assert run([Shard(0)], [Shard(1)])[0] is Reason.SHARDED


@torch.no_grad()
def through_inductor(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    model, x = Block().eval(), outlying(3, 5, WIDTH)
    options: dict[str, Any] = {"min_features": 0}
    compiled = torch.compile(megatron(mesh, model), backend="int8", options=options, dynamic=True)
    noise = relative(torch.compile(model, backend="int8", options=options)(x), model(x))
    for batch in (x, outlying(2, 9, WIDTH)):
        assert 0 < relative(compiled(batch), model(batch)) < 1.5 * noise


@torch.no_grad()
def a_process_dies(rank: int, world: int) -> None:
    """Then the others' next product of several processes raises, rather than to wait for it."""
    mesh = init_device_mesh("cpu", (world,))
    compiled = compile_eager(megatron(mesh, Block().eval()))
    x = outlying(3, WIDTH)
    compiled(x)
    distributed.barrier()
    if rank:
        with pytest.raises(RuntimeError, match=r"(?i)closed|peer|timed out|connection"):
            compiled(x)
    os._exit(0)  # where the end of the process group would wait


def the_essentials(rank: int, world: int) -> None:
    """One after the other, as starting processes takes longer than any of them."""
    every_linear_runs_on_its_shard(rank, world, thorough=False)
    torch._dynamo.reset()
    shards_quantise_their_own_slice(rank, world)
    torch._dynamo.reset()
    writes_are_seen(rank, world)


def the_rest(rank: int, world: int) -> None:
    every_linear_runs_on_its_shard(rank, world, thorough=True)
    torch._dynamo.reset()
    sequences_may_be_sharded(rank, world)
    torch._dynamo.reset()
    the_rest_stays_float(rank, world)
