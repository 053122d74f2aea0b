"""Products of DTensors that every process can compute from its own shards, and nothing else.

For each dimension of the mesh, with x [..., K], weight [N, K], bias [N] and the result [..., N]:

    x            weight       bias         result
    Replicate    Replicate    Replicate    Replicate
    Replicate    Shard(0)     Shard(0)     Shard(-1)     column-wise: each process has some of the outputs
    Shard(-1)    Shard(1)     Replicate    Partial       row-wise: each has a summand of all outputs
    Shard(d)     Replicate    Replicate    Shard(d)      rows of x, if a row's result depends on no other row

Results lie in equal parts: the shape of the whole is told from a shard's.

Row-wise, a process quantises its own slice of x, with row scales and outlier columns of that slice. The dequantised
summands are what is added up.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from int8compile.graph.dump import meta_tensor
from int8compile.torch_internals.dtensors import is_dtensor, is_partial_sum, layouts_can_be_written, shard_dim

#: how a bias is sharded where the weight is in this way; None for Replicate, else the dimension
_BIAS = {None: None, 0: 0, 1: None}


class Shards(NamedTuple):
    """A product of shards.

    Args:
        summands: how many processes hold a summand of a result.
        refusal: why there is none.
    """

    summands: int = 1
    refusal: str = ""


def match_shards(node: fx.Node, *, rows: bool) -> Shards | None:
    """Whether a linear of DTensors ``aten.linear(x, weight, bias)`` is one of shards; None if it is of plain tensors.

    Args:
        rows: whether a row's result depends on no other row.
    """
    x, weight, bias, out = (meta_tensor(n) if isinstance(n, fx.Node) else None for n in (*node.args, node))
    if x is None or weight is None or out is None:
        return None
    given = [value for value in (x, weight, bias, out) if value is not None]
    if not any(map(is_dtensor, given)):
        return None
    if not all(map(is_dtensor, given)):
        return Shards(refusal="beside plain tensors")
    if not layouts_can_be_written():
        return Shards(refusal="torch 2.13 is needed")
    return _match(x, weight, bias, out, rows)


def _match(x: Any, weight: Any, bias: Any, out: Any, rows: bool) -> Shards:
    mesh = x.device_mesh
    if any(value.device_mesh != mesh for value in (weight, out, *([] if bias is None else [bias]))):
        return Shards(refusal="on several meshes")
    partial = []
    for i in range(mesh.ndim):
        try:
            of_x, of_weight = shard_dim(x.placements[i]), shard_dim(weight.placements[i])
            of_bias = None if bias is None else shard_dim(bias.placements[i])
        except ValueError as error:
            return Shards(refusal=str(error))
        last = x.dim() - 1
        if (of_x == last) != (of_weight == 1) or (of_x is not None and of_weight == 0):
            return Shards(refusal=_layouts(x, weight))
        if of_x not in (None, last) and not rows:
            return Shards(refusal="rows of x in several processes; outlier_policy='element' takes them")
        if bias is not None and of_bias != _BIAS[of_weight]:
            return Shards(refusal=f"bias {bias.placements}")
        if of_weight == 1:
            partial.append(i)
            expected = is_partial_sum(out.placements[i])
        else:
            expected = _is_shard(out.placements[i], last if of_weight == 0 else of_x)
        if not expected:
            return Shards(refusal=f"{_layouts(x, weight)} to {out.placements}")
    return Shards(math.prod(mesh.size(i) for i in partial), refusal=_unequal_parts(out))


def _unequal_parts(out: Any) -> str:
    """Why the shape of the whole result is not that of a shard times their number; "" if it is."""
    for dim, size in enumerate(out.shape):
        dims = [i for i, placement in enumerate(out.placements) if _is_shard(placement, dim)]
        parts = math.prod(out.device_mesh.size(i) for i in dims)
        if parts > 1 and not statically_known_true(size % parts == 0):
            what = "features" if dim == out.dim() - 1 else "rows"
            return f"{size} {what} in {parts} unequal parts" if isinstance(size, int) else f"{what} of any number"
    return ""


def _is_shard(placement: Any, dim: int | None) -> bool:
    try:
        return shard_dim(placement) == dim
    except ValueError:
        return False


def _layouts(x: Any, weight: Any) -> str:
    return f"x {x.placements}, weight {weight.placements}"
