"""What tests of operators on DTensors, and of int8 modules under tensor parallelism, run in each process."""

from __future__ import annotations

import copy
from typing import Any

import torch
from compiling import compile_eager
from tensor_parallel import WIDTH, Block, outlying, relative
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

import int8compile
from int8compile.integrations.dtensor import ColwiseParallel, RowwiseParallel
from int8compile.ops import grouped_linear, linear, quantize_rowwise, quantize_weight, scaled_mm
from int8compile.report import Reason


def layouts_of_operators(rank: int, world: int) -> None:
    """Column-wise to the bit; row-wise the sum of products of slices; rows of x gathered under the column policy."""
    mesh = init_device_mesh("cpu", (world,))
    n, k = 2 * WIDTH, 4 * WIDTH
    x, weight, bias = outlying(3, 2 * world, k), torch.randn(n, k), torch.randn(n)
    codes, scale = quantize_weight(weight)

    def on(tensor: torch.Tensor, *layout: Any) -> Any:
        return distribute_tensor(tensor, mesh, layout)

    whole = Replicate()
    want = linear(x, codes, scale, bias, 6.0, "column")
    columns = linear(on(x, whole), on(codes, Shard(0)), on(scale, Shard(0)), on(bias, Shard(0)), 6.0, "column")
    assert columns.placements == (Shard(2),)
    torch.testing.assert_close(columns.full_tensor(), want, rtol=0, atol=0)

    rows = linear(on(x, Shard(2)), on(codes, Shard(1)), on(scale, whole), on(bias, whole), 6.0, "column")
    assert rows.placements == (Partial(),)
    slices = zip(x.chunk(world, -1), codes.chunk(world, 1), strict=True)
    expected = sum(linear(part, of_weight, scale, None, 6.0, "column") for part, of_weight in slices) + bias
    torch.testing.assert_close(rows.full_tensor(), expected, rtol=1e-5, atol=1e-4)  # sums in another order

    for policy, layout in (("column", whole), ("element", Shard(1))):
        out = linear(on(x, Shard(1)), on(codes, whole), on(scale, whole), on(bias, whole), 6.0, policy)
        assert out.placements == (layout,), policy
        torch.testing.assert_close(out.full_tensor(), linear(x, codes, scale, bias, 6.0, policy), rtol=0, atol=0)

    flat = x.flatten(0, 1)
    quantized = quantize_rowwise(flat, 6.0)
    want = scaled_mm(*quantized[:2], flat, quantized[2], codes, scale, bias, torch.float32)
    parts = [on(part, whole) for part in (*quantized[:2], flat, quantized[2])]
    out = scaled_mm(*parts, on(codes, Shard(0)), on(scale, Shard(0)), on(bias, Shard(0)), torch.float32)
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), want, rtol=0, atol=0)
    placed = (on(quantized[0], Shard(1)), on(quantized[1], whole), on(flat, Shard(1)), on(quantized[2], Shard(0)))
    out = scaled_mm(*placed, on(codes, Shard(1)), on(scale, whole), on(bias, whole), torch.float32)
    assert out.placements == (Partial(),)
    torch.testing.assert_close(out.full_tensor(), want, rtol=1e-5, atol=1e-4)

    experts = [quantize_weight(torch.randn(n, k)) for _ in range(3)]
    codes, scale = (torch.stack([e[i] for e in experts]) for i in (0, 1))
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    want = grouped_linear(flat, codes, scale, ends, None, 6.0, "column")
    out = grouped_linear(
        on(flat, whole), on(codes, Shard(1)), on(scale, Shard(1)), on(ends, whole), None, 6.0, "column"
    )
    assert out.placements == (Shard(1),)
    torch.testing.assert_close(out.full_tensor(), want, rtol=0, atol=0)
    out = grouped_linear(
        on(flat, Shard(1)), on(codes, Shard(2)), on(scale, whole), on(ends, whole), None, 6.0, "column"
    )
    assert out.placements == (Partial(),)
    assert relative(out.full_tensor(), want) < 0.05


def gradients(rank: int, world: int) -> None:
    """Of x and bias: those of one process."""
    mesh = init_device_mesh("cpu", (world,))
    codes, scale = quantize_weight(torch.randn(WIDTH, 2 * WIDTH))
    values, offset, upstream = torch.randn(5, 2 * WIDTH), torch.randn(WIDTH), torch.randn(5, WIDTH)
    x, bias = values.clone().requires_grad_(), offset.clone().requires_grad_()
    linear(x, codes, scale, bias, 6.0, "column").backward(upstream)
    for of_x, of_weight, of_scale in ((Replicate(), 0, Shard(0)), (Shard(1), 1, Replicate())):
        ours = distribute_tensor(values, mesh, [of_x]).requires_grad_()
        weights = [distribute_tensor(codes, mesh, [Shard(of_weight)]), distribute_tensor(scale, mesh, [of_scale])]
        other = distribute_tensor(offset, mesh, [of_scale]).requires_grad_()
        out = linear(ours, *weights, other, 6.0, "column").redistribute(placements=[Replicate()])
        out.backward(distribute_tensor(upstream, mesh, [Replicate()]))
        for mine, theirs in ((ours, x), (other, bias)):
            assert isinstance(mine.grad, DTensor)
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad)


@torch.no_grad()
def int8_modules(rank: int, world: int) -> None:
    """``quantize_``, then a plan: eager and compiled, and a state dict that gathers to that of one process."""
    mesh = init_device_mesh("cpu", (world,))
    model, x = Block().eval(), outlying(3, 5, WIDTH)
    want = model(x)
    int8compile.quantize_(model, {"min_features": 0})
    alone = model(x)
    plan: dict[str, Any] = {name: ColwiseParallel() for name in ("q", "k", "v", "gate", "up")}
    plan |= {name: RowwiseParallel() for name in ("o", "down")}
    split = parallelize_module(copy.deepcopy(model), mesh, plan)
    noise = relative(alone, want)
    eager = split(x)
    assert 0 < relative(eager, want) < 1.5 * noise
    compiled = compile_eager(split)
    torch.testing.assert_close(compiled(x), eager)
    report = int8compile.last_report()
    assert report is not None
    assert {site.reason for site in report.sites} == {Reason.PREQUANTIZED}
    assert len(report.sites) == 7
    saved = model.state_dict()
    for name, value in split.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        torch.testing.assert_close(value, saved[name], rtol=0, atol=0)
    bytes_held = sum(b.to_local().numel() for b in split.buffers() if isinstance(b, DTensor) and b.dim() == 2)
    assert bytes_held == sum(b.numel() for b in model.buffers() if b.dim() == 2) / world


def all_of_them(rank: int, world: int) -> None:
    layouts_of_operators(rank, world)
    gradients(rank, world)
    int8_modules(rank, world)
