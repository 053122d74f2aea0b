"""The analysis of effects: what it says a call writes is at least what the call, when it is run, is seen to write."""

from __future__ import annotations

import operator
import warnings

import pytest
import torch
from torch import fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.nn import functional as F

from int8compile.passes.analysis import Effects

NUMBERS = {"float": 0.5, "Scalar": 0.5, "number": 0.5, "int": 0, "SymInt": 0, "bool": False}


def argument_for(kind: str, n: int):
    """A value for an operator's argument of this type, the n-th of its call; KeyError where there is none."""
    kind = kind.replace("Optional[", "").replace("]", "") if kind.startswith("Optional[") else kind
    if kind == "Tensor":
        return torch.rand(3, 3, generator=torch.Generator().manual_seed(n)) + 0.1
    if kind == "List[Tensor]":
        return [argument_for("Tensor", n), argument_for("Tensor", n + 100)]
    if kind in ("List[int]", "List[SymInt]"):
        return [1]
    if kind in ("List[float]", "List[Scalar]", "List[number]"):
        return [0.5, 0.5]
    return NUMBERS[kind]


def mutable_overloads():
    """Each overload of PyTorch's operators that says it writes and can be called with arguments made up."""
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket):
            continue
        for overload in (getattr(packet, o) for o in packet.overloads()):
            if overload._schema.is_mutable and not name.startswith(("_fused", "record_stream")):
                yield overload


def made_up_call(overload):
    """Arguments, as (positional, by keyword); None where there are none that the operator takes."""
    args, kwargs = [], {}
    for n, argument in enumerate(overload._schema.arguments):
        if argument.has_default_value() and not (argument.alias_info is not None and argument.alias_info.is_write):
            continue
        try:
            value = argument_for(str(argument.type), n)
        except KeyError:
            return None
        if argument.kwarg_only:
            kwargs[argument.name] = value
        elif len(args) == n:
            args.append(value)
        else:
            kwargs[argument.name] = value
    return args, kwargs


def tensors_in(value):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def changed_by(call, given):
    """Positions of the tensors that a call changes; None if it raises."""
    before = [t.clone() for t in given]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception:
        return None
    return {
        i for i, (t, b) in enumerate(zip(given, before, strict=True)) if t.shape != b.shape or not torch.equal(t, b)
    }


def graph_of(target, args, kwargs, tensors):
    """A graph that makes one call, of a function or (a name) a method, on inputs that are these tensors."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(tensors))]
    node_of = {id(t): n for t, n in zip(tensors, nodes, strict=True)}

    def lift(value):
        if isinstance(value, list):
            return [lift(v) for v in value]
        return node_of[id(value)] if isinstance(value, torch.Tensor) else value

    kind = "call_method" if isinstance(target, str) else "call_function"
    call = graph.create_node(kind, target, tuple(map(lift, args)), {k: lift(v) for k, v in kwargs.items()})
    graph.output(call)
    mode = torch._subclasses.FakeTensorMode()
    for node, tensor in zip(nodes, tensors, strict=True):
        node.meta["val"] = mode.from_tensor(tensor)
    return graph, nodes, call


def targets_of(overload, kwargs):
    """The ways to write the same call: the overload, its packet, torch's function and the method."""
    name = overload._schema.name.split("::")[1]
    yield overload
    yield overload.overloadpacket
    if hasattr(torch, name) and set(kwargs) <= {"out"}:
        yield getattr(torch, name)
    if hasattr(torch.Tensor, name) and not kwargs:
        yield name


def test_every_write_of_pytorchs_operators_is_seen():
    """Over all schemas, in four ways of writing the call."""
    checked, missed = 0, []
    for overload in mutable_overloads():
        if (made := made_up_call(overload)) is None:
            continue
        for target in targets_of(overload, made[1]):
            args, kwargs = made_up_call(overload)
            given = tensors_in((args, kwargs))
            graph, nodes, call = graph_of(target, args, kwargs, given)
            run = operator.methodcaller(target, *args[1:], **kwargs) if isinstance(target, str) else None
            changed = changed_by(lambda: run(args[0]) if run else target(*args, **kwargs), given)  # noqa: B023
            if not changed:
                continue
            checked += 1
            effects = Effects(graph)
            missed += [f"{target} input {i}" for i in changed if not effects.ever_written(nodes[i])]
            missed += [f"{target} writes at no node"] if not effects.writes(call) else []
    assert not missed
    assert checked > 1000


def effects_of(function, *inputs):
    """A function's graph with fake values, its effects, and its nodes by name."""
    gm = fx.symbolic_trace(function)
    FakeTensorProp(gm).propagate(*inputs)
    return Effects(gm.graph), {node.name: node for node in gm.graph.nodes}


def test_pure_calls_write_nothing():
    def pure(x, w, i):
        a = F.silu(x) + F.dropout(x, 0.1, True) * F.softmax(x, -1)
        b = F.layer_norm(a, (4,)).relu().view(2, 8).reshape(4, 4).to(torch.float64).float()
        c = torch.einsum("ij,jk->ik", b, w) @ w.t() + F.embedding(i, w)
        return torch.cat([a, c.contiguous(), c[0:1], F.pad(c, (0, 0))]), c.T, c.mT, x.data

    effects, nodes = effects_of(pure, torch.ones(4, 4), torch.ones(4, 4), torch.tensor([1]))
    assert [name for name, node in nodes.items() if effects.writes(node)] == []
    assert not any(map(effects.reshaped, nodes.values()))


def test_views_lie_in_their_base_and_copies_do_not():
    def f(x):
        view = x.view(-1)[1:]
        copy = x.t().reshape(-1)
        view.add_(1)
        return view, copy

    effects, nodes = effects_of(f, torch.ones(2, 3))
    assert effects.memory(nodes["view"]) == effects.memory(nodes["x"]) == effects.memory(nodes["getitem"])
    assert not effects.memory(nodes["reshape"]) & effects.memory(nodes["x"])
    assert effects.ever_written(nodes["x"])
    assert not effects.ever_written(nodes["reshape"])


def test_the_two_questions():
    def f(x, b):
        first = x.relu()
        x.add_(1)
        second = x.relu()
        b.add_(1)
        return first, second, x.sin()

    effects, n = effects_of(f, torch.ones(2, 3), torch.ones(3))
    assert effects.changes(n["x"], n["relu"], n["relu_1"])
    assert effects.changes(n["x"], n["add_"], n["relu_1"])  # the start counts
    assert not effects.changes(n["x"], n["relu"], n["add_"])  # the end does not
    assert not effects.changes(n["x"], n["relu_1"], n["sin"])
    assert effects.readable_at(n["x"], n["relu_1"], n["sin"])
    assert not effects.readable_at(n["x"], n["relu"], n["relu_1"])
    assert not effects.readable_at(n["relu_1"], n["relu"], n["sin"])  # not there yet
    assert not effects.readable_at(n["relu"], n["relu"], n["sin"])


@fx.wrap
def unknown(x, y):
    return x.clone()


def test_what_is_not_known_writes_everything_it_is_given_and_may_be_any_of_it():
    def f(x, y, z):
        out = unknown(x, y)
        return out, z

    effects, n = effects_of(f, *(torch.ones(2, 3) for _ in range(3)))
    assert effects.ever_written(n["x"])
    assert effects.ever_written(n["y"])
    assert not effects.ever_written(n["z"])
    assert effects.memory(n["unknown"]) >= effects.memory(n["x"]) | effects.memory(n["y"])


def test_a_module_may_write_anything():
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    mode = torch._subclasses.FakeTensorMode()
    for node in (x, y):
        node.meta["val"] = mode.from_tensor(torch.ones(2))
    graph.output(graph.call_module("inner", (x,)))
    assert Effects(graph).ever_written(y)


def test_inputs_whose_memory_is_not_known_may_be_any():
    def f(x, y):
        y.add_(1)
        return x.relu()

    graph = fx.symbolic_trace(f).graph
    x, y, add, relu, _ = graph.nodes
    mode = torch._subclasses.FakeTensorMode()
    for node in (y, add, relu):
        node.meta["val"] = mode.from_tensor(torch.ones(2))
    assert Effects(graph).ever_written(x)


def test_names_of_written_arguments_that_schemas_do_not_mark():
    def f(x, mean, var):
        torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)
        return x, mean, var

    effects, n = effects_of(f, torch.rand(4, 3), torch.zeros(3), torch.ones(3))
    assert effects.ever_written(n["mean"])
    assert effects.ever_written(n["var"])
    assert not effects.ever_written(n["x"])


@pytest.mark.parametrize("name", ["unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "as_strided_", "resize_"])
def test_shapes_changed_in_place(name):
    args = {
        "unsqueeze_": (0,),
        "transpose_": (0, 1),
        "swapaxes_": (0, 1),
        "as_strided_": ((2,), (1,)),
        "resize_": ((1,),),
    }

    def f(x, y):
        h = x.relu()
        getattr(h, name)(*args.get(name, ()))
        return h, y

    effects, n = effects_of(f, torch.ones(2, 3), torch.ones(2, 3))
    assert effects.reshaped(n["relu"])
    assert not effects.reshaped(n["y"])


def test_values_that_share_no_storages_are_told_apart_by_schemas():
    """As in a program from a file: each of its fakes has a storage of its own."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [-1]))
    copy = graph.call_function(torch.ops.aten.clone.default, (x,))
    part = graph.call_function(torch.ops.aten.slice.Tensor, (view, 0, 1, 3))
    graph.call_function(torch.ops.aten.add_.Tensor, (part, 1))
    graph.output((view, copy, part))
    mode = torch._subclasses.FakeTensorMode()
    for node in graph.nodes:
        node.meta["val"] = mode.from_tensor(torch.ones(4))
    effects = Effects(graph)
    assert effects.ever_written(x)
    assert effects.ever_written(view)
    assert not effects.ever_written(copy)
