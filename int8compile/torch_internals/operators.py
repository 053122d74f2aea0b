"""The operators behind a graph's calls: the schemas of what is called, and what a call does when it runs on fakes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.jit._builtins import _find_builtin
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from int8compile.torch_internals.tensors import is_fake

#: functions written in Python whose only effects are those of the operators that they call
_PYTHON_FUNCTIONS = ("torch", "torch.functional", "torch.nn.functional", "torch._tensor", "_operator")
below_autograd: Callable[[], contextlib.AbstractContextManager[None]] = torch._C._AutoDispatchBelowAutograd
_GET_DATA = getattr(torch._C._autograd, "_get_data_attr", None)


@functools.cache
def overloads_of(target: Callable[..., Any] | str) -> tuple[OpOverload, ...]:
    """The overloads that a call's target stands for, in no order; none where it is no operator.

    Args:
        target: of a ``call_function``, or a method's name.
    """
    if isinstance(target, OpOverload):
        return (target,)
    if isinstance(target, OpOverloadPacket):
        return _overloads(target)
    if isinstance(target, str):
        # Dunder methods such as __setitem__ are Python's, whatever operators have their names.
        known = hasattr(torch.Tensor, target) and not target.startswith("__")
        return _overloads(getattr(torch.ops.aten, target, None)) if known else ()
    if isinstance(target, HigherOrderOperator):
        return ()
    try:
        name = _find_builtin(target)  # such as "aten::add" for torch.add
    except TypeError:  # not hashable
        return ()
    namespace, _, operator = (name or "").partition("::")
    return _overloads(getattr(torch.ops.aten, operator, None)) if namespace == "aten" else ()


def _overloads(packet: object) -> tuple[OpOverload, ...]:
    if not isinstance(packet, OpOverloadPacket):
        return ()
    return tuple(getattr(packet, name) for name in packet.overloads())


def is_higher_order(node: fx.Node) -> bool:
    """Whether a node calls an operator that takes graphs (``cond``, activation checkpointing) or kernels."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def run_on_fakes(
    node: fx.Node, value_of: Callable[[fx.Node], object], tell: Callable[[OpOverload, Any, Any], None]
) -> bool:
    """Run a call on stand-ins of its fake arguments; whether it came to its end.

    Not run is what would do more than call operators: functions of other libraries and of the user's. Nor is what
    changes shapes in place, which ends the process where a fake has symbolic sizes (torch 2.13). The stand-ins share
    the fakes' storages and nothing else.

    Args:
        tell: called with each operator and its arguments, before it is run.
    """
    if not _runs_on_fakes(node):
        return False
    stand_ins: dict[fx.Node, object] = {}
    modes = set()
    for argument in node.all_input_nodes:
        leaves, spec = pytree.tree_flatten(value_of(argument))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor):
                if not is_fake(leaf):
                    return False
                modes.add(leaf.fake_mode)
                leaves[i] = leaf.data
        stand_ins[argument] = pytree.tree_unflatten(leaves, spec)
    if len(modes) != 1:
        return False
    given: Any = (node.args, node.kwargs)
    args, kwargs = fx.node.map_arg(given, lambda n: cast(Any, stand_ins[n]))
    try:
        with _quiet(modes.pop()), _Listener(tell):
            if node.op == "call_method":
                getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # whatever a function raises on fakes: then what it does is not known
        return False
    return True


def _runs_on_fakes(node: fx.Node) -> bool:
    if node.op == "call_method":
        return hasattr(torch.Tensor, str(node.target))
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return False
    if node.target is getattr or node.target is _GET_DATA:  # ``x.T`` and ``x.data``, as Dynamo writes them
        return True
    return getattr(node.target, "__module__", None) in _PYTHON_FUNCTIONS or bool(overloads_of(node.target))


@contextlib.contextmanager
def _quiet(mode: Any) -> Iterator[None]:
    """Run in a fake mode without gradients, leaving no unknown sizes behind for the compiler to ask about."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        stack.enter_context(mode)
        yield


class _Listener(TorchDispatchMode):
    def __init__(self, tell: Callable[[OpOverload, Any, Any], None]) -> None:
        super().__init__()
        self._tell = tell

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._tell(func, args, kwargs or {})
        if torch.Tag.inplace_view in func.tags:
            raise RuntimeError("not run")
        return func(*args, **(kwargs or {}))
