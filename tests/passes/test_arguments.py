"""A call's arguments by name, however the call was written."""

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from int8compile.ops import linear
from int8compile.passes.analysis.arguments import arguments

aten = torch.ops.aten
LINEAR = {"x": "x", "weight": "w", "weight_scale": "s", "bias": None, "threshold": 6.0}
LINEAR |= {"outlier_policy": "column", "columns": None, "column_weight": None}


def named(target, args, kwargs):
    """The arguments of a call on placeholders, which are written as their names."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in "xwsqkv"}
    args, kwargs = torch.utils._pytree.tree_map(lambda a: nodes.get(a, a), (args, kwargs))
    found = arguments(
        graph.create_node("call_method" if isinstance(target, str) else "call_function", target, args, kwargs)
    )
    return {name: str(value) if isinstance(value, fx.Node) else value for name, value in found.items()}


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", "w", "s", None, 6.0, "column"), {}),
        (("x", "w", "s", None, 6.0), {}),
        (("x", "w"), {"threshold": 6.0, "bias": None, "weight_scale": "s"}),
        ((), {name: value for name, value in LINEAR.items() if name not in ("outlier_policy", "columns")}),
    ],
)
@pytest.mark.parametrize("target", [linear, torch.ops.int8compile.linear])
def test_our_operator(target, args, kwargs):
    assert list(named(target, args, kwargs).items()) == list(LINEAR.items())


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "expected"),
    [
        (F.scaled_dot_product_attention, ("q", "k"), {"value": "v"}, {"key": "k", "value": "v", "enable_gqa": False}),
        (
            aten.scaled_dot_product_attention.default,
            ("q", "k", "v", None, 0.0, True),
            {},
            {"value": "v", "is_causal": True},
        ),
        (F.embedding, ("x",), {"weight": "w"}, {"weight": "w", "padding_idx": None}),
        (F.embedding, ("x", "w", 3), {}, {"weight": "w", "padding_idx": 3}),
        (torch.embedding, ("w", "x"), {}, {"weight": "w", "indices": "x"}),
        (aten.embedding.default, ("w", "x"), {}, {"weight": "w"}),
        ("reshape", ("x", 2, 3), {}, {"self": "x", "shape": (2, 3)}),
    ],
)
def test_calls_of_the_user(target, args, kwargs, expected):
    assert named(target, args, kwargs).items() >= expected.items()


@pytest.mark.parametrize(
    ("target", "args", "kwargs"),
    [
        (linear, ("x",), {}),
        (linear, ("x",) * 9, {}),
        (F.embedding, (), {"nothing": 1}),
        (torch.ops.aten.mm, ("x",), {}),
        ("no_method", ("x",), {}),
    ],
)
def test_no_names_where_they_are_not_known(target, args, kwargs):
    assert named(target, args, kwargs) == {}
