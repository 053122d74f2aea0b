"""Results of DTensors in parts of different sizes stay float: the whole's shape cannot be told from a shard's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiling import compile_eager
from torch import distributed, nn

import int8compile
from int8compile.report import Reason

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture(autouse=True)
def four_processes() -> Iterator[None]:
    """The first of four, of which the others are not there: nothing here communicates."""
    distributed.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=4)
    yield
    distributed.destroy_process_group()


def run(
    shape: tuple[int, ...], n: int, rows: int, weight: list[Any], x: list[Any], dynamic: bool = False, **options: Any
) -> Any:
    """The site of a linear of that layout, whose result is the float one's in shape and, nearly, in value."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", shape)
    model = nn.Linear(128, n).requires_grad_(False)
    for name in ("weight", "bias"):
        value = distribute_tensor(getattr(model, name), mesh, weight, src_data_rank=None)
        setattr(model, name, nn.Parameter(value, requires_grad=False))
    given = distribute_tensor(torch.randn(rows, 128), mesh, x, src_data_rank=None)
    want: Any = model(given)
    if dynamic:
        torch._dynamo.mark_dynamic(given, 0)
    with torch.no_grad():
        out = compile_eager(nn.Sequential(model), **options)(given)
    assert out.shape == want.shape
    assert out.placements == want.placements
    assert out.to_local().shape == want.to_local().shape
    assert (out.to_local() - want.to_local()).norm() < 0.05 * want.to_local().norm()
    report = int8compile.last_report()
    assert report is not None
    (site,) = report.sites
    return site


def test_rows():
    from torch.distributed.tensor import Replicate, Shard

    site = run((4,), 64, 9, [Replicate()], [Shard(0)], outlier_policy="element")
    assert (site.reason, site.detail) == (Reason.SHARDED, "9 rows in 4 unequal parts")
    assert run((4,), 64, 8, [Replicate()], [Shard(0)], outlier_policy="element").rewritten
    site = run((4,), 64, 8, [Replicate()], [Shard(0)], outlier_policy="element", dynamic=True)
    assert (site.reason, site.detail) == (Reason.SHARDED, "rows of any number")


def test_features_over_two_dimensions_of_a_mesh():
    from torch.distributed.tensor import Replicate, Shard

    weight, x = [Shard(0), Shard(0)], [Replicate(), Replicate()]
    site = run((2, 2), 66, 8, weight, x)
    assert (site.reason, site.detail) == (Reason.SHARDED, "66 features in 4 unequal parts")
    assert run((2, 2), 64, 8, weight, x).rewritten
