"""Finds weights that are rows of a parameter, such as q's third of ``nn.MultiheadAttention.in_proj_weight``.

Scales are one a row, so the int8 form of the slice is the same slice of the whole parameter's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx

from int8compile.graph.capture import constant_of, stored_tensor
from int8compile.graph.dump import meta_tensor
from int8compile.passes.analysis.effects import storage_of
from int8compile.passes.context import PassContext
from int8compile.torch_internals.dtensors import is_dtensor

aten = torch.ops.aten


class Rows(NamedTuple):
    """Rows [start, stop) of a parameter or buffer [N, K], of a DTensor those of this process's shard."""

    root: fx.Node
    start: int
    stop: int

    def of(self, whole: fx.Node, before: fx.Node, context: PassContext) -> fx.Node:
        """The same rows of another tensor that has one for each of the parameter's."""
        return context.call(before, aten.slice.Tensor, (whole, 0, self.start, self.stop), like=before)


def rows_of_constant(node: fx.Node) -> Rows | None:
    """What a view is a view of, if it is whole rows of a constant; by its memory, however it was made."""
    root = node
    while constant_of(root) is None:
        source = root.args[0] if root.op in ("call_function", "call_method") and root.args else None
        if not isinstance(source, fx.Node):
            return None
        root = source
    constant = constant_of(root)
    assert constant is not None
    whole, part = stored_tensor(constant), meta_tensor(node)
    if part is not None and is_dtensor(part):  # rows of all shards
        return None
    if root is node or whole is None or part is None or storage_of(whole) is None:
        return None
    if storage_of(whole) != storage_of(part):
        return None
    same = part.dim() == 2 and part.dtype == whole.dtype and part.shape[1:] == whole.shape[1:]
    same = same and part.is_neg() == whole.is_neg()
    if not same or not part.is_contiguous() or not whole.is_contiguous() or part.shape[1] == 0:
        return None
    start, rest = divmod(int(part.storage_offset() - whole.storage_offset()), int(part.shape[1]))
    stop = start + int(part.shape[0])
    return Rows(constant, start, stop) if rest == 0 and start >= 0 and stop <= int(whole.shape[0]) else None
