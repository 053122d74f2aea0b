"""Ways to write to a tensor, one for each road that a write can take into a graph, for tests that multiply them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

Write = Callable[[torch.Tensor], object]

_LIBRARY = torch.library.Library("int8compile_writes", "DEF")
_LIBRARY.define("scale_(Tensor(a!) x, float by) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("scale_all_(Tensor(a!)[] xs, *, float by) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("scale_second(Tensor x, Tensor(a!) y) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define("filled_with(Tensor x, *, Tensor(a!) out) -> Tensor(a!)", tags=(torch.Tag.pt2_compliant_tag,))


def _scale(x: torch.Tensor, by: float) -> None:
    x.mul_(by)


def _scale_all(xs: list[torch.Tensor], *, by: float) -> None:
    for x in xs:
        x.mul_(by)


def _scale_second(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y.mul_(-3)
    return x.clone()


for _key in ("CPU", "Meta"):
    _LIBRARY.impl("scale_", _scale, _key)
    _LIBRARY.impl("scale_all_", _scale_all, _key)
    _LIBRARY.impl("scale_second", _scale_second, _key)

ours = torch.ops.int8compile_writes


def _large(t: torch.Tensor) -> torch.Tensor:
    return t.abs().max() * -3


def _in_place_operator(t: torch.Tensor) -> None:
    t *= -3


def _item(t: torch.Tensor) -> None:
    t[0] = _large(t)


def _all_items(t: torch.Tensor) -> None:
    t[...] = t * -3


def _items_by_mask(t: torch.Tensor) -> None:
    t[t > 0] = _large(t)


def _items_by_index(t: torch.Tensor) -> None:
    t[torch.tensor([0])] = _large(t)


def _attribute_data(t: torch.Tensor) -> None:
    t.data.mul_(-3)


def _tuple_out(t: torch.Tensor) -> None:
    both = torch.stack([t * -3, t * -4])
    torch.max(both, 0, out=(t, torch.zeros(t.shape, dtype=torch.int64)))


def _branch(t: torch.Tensor) -> None:
    t.mul_(torch.where(t.sum() > -1e9, -3.0, 1.0))


def _view_of_view(t: torch.Tensor) -> None:
    t.view(-1)[1:].unsqueeze(0).mul_(-3)


def _through_a_swap(t: torch.Tensor) -> None:
    a, b = t.detach().unbind(0)[0], t
    a.copy_(b[0] * -3)


WRITES: dict[str, Write] = {
    "method": lambda t: t.mul_(-3),
    "method with keywords": lambda t: t.add_(other=t, alpha=-4),
    "operator": _in_place_operator,
    "setitem": _item,
    "setitem ellipsis": _all_items,
    "setitem mask": _items_by_mask,
    "setitem index": _items_by_index,
    "torch function": lambda t: torch.neg_(t.mul_(3)),
    "out=": lambda t: torch.mul(t, -3, out=t),
    "out= in place of another": lambda t: torch.neg(t * 3, out=t),
    "tuple out=": _tuple_out,
    "foreach": lambda t: torch._foreach_mul_([t], -3.0),
    "foreach of several": lambda t: torch._foreach_mul_([torch.ones(2), t], [2.0, -3.0]),
    "foreach copy": lambda t: torch._foreach_copy_([t], [t * -3]),
    "foreach packet": lambda t: torch.ops.aten._foreach_mul_([t], -3.0),
    "overload": lambda t: torch.ops.aten.mul_.Tensor(t, torch.tensor(-3.0)),
    "overload with keywords": lambda t: torch.ops.aten.mul_.Scalar(self=t, other=-3),
    "packet": lambda t: torch.ops.aten.mul_(t, -3),
    "packet out=": lambda t: torch.ops.aten.mul(t, torch.tensor(-3.0), out=t),
    "overload out=": lambda t: torch.ops.aten.mul.out(t, torch.tensor(-3.0), out=t),
    "view": lambda t: t.view(-1).mul_(-3),
    "view of a view": _view_of_view,
    "part": lambda t: t.narrow(0, 0, 1).add_(_large(t)),
    "detach": lambda t: t.detach().mul_(-3),
    "data": _attribute_data,
    "unbind": _through_a_swap,
    "copy": lambda t: t.copy_(t * -3),
    "fill": lambda t: t.fill_(55),
    "zero": lambda t: t.zero_(),
    "masked fill": lambda t: t.masked_fill_(t > 0, _large(t)),
    "scatter": lambda t: t.scatter_(0, torch.zeros(t[:1].shape, dtype=torch.int64), _large(t).expand_as(t[:1])),
    "index add": lambda t: t.index_add_(0, torch.tensor([0]), _large(t).expand_as(t[:1])),
    "index put": lambda t: t.index_put_((torch.tensor([0]),), _large(t)),
    "lerp by keywords": lambda t: t.lerp_(end=t * -9, weight=0.5),
    "relu": lambda t: F.relu(t.neg_(), inplace=True),
    "relu by position": lambda t: F.relu(t.neg_(), True),
    "hardtanh": lambda t: F.hardtanh(t, -1.0, 1.0, True),
    "threshold": lambda t: F.threshold(t, 1e9, -40.0, inplace=True),
    "alpha dropout": lambda t: F.dropout(t, 1.0, True, inplace=True),
    "leaky relu": lambda t: torch.nn.functional.leaky_relu_(t, -3.0),
    "init": lambda t: torch.nn.init.constant_(t, 33.0),
    "condition": _branch,
    "custom": lambda t: ours.scale_(t, -3.0),
    "custom overload by keywords": lambda t: ours.scale_.default(x=t, by=-3.0),
    "custom list": lambda t: ours.scale_all_([t], by=-3.0),
    "custom second argument": lambda t: ours.scale_second(torch.ones(1), t),
}
"""By name. Each changes a tensor of one dimension or more so much that no rounding hides it."""
