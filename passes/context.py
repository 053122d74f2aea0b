"""The context of a pass: options, the capture on which it lifts weights, and the sites with their Reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from int8compile.config import Int8Config
from int8compile.graph.capture import Capture
from int8compile.graph.dump import meta_value
from int8compile.passes.analysis.effects import Effects
from int8compile.report import Site


@dataclasses.dataclass
class PassContext:
    """Shared by the passes of one run.

    Args:
        capture: the graph's inputs and lifted weights.
        config: the user's options.
        grad_enabled: whether gradients are recorded where the graph begins.
        native_cpu: whether the native CPU kernels are loaded and compute the graph, in this process.
        sites: one for each linear, written by ``normalize`` and ``quantize``.
        unread: the user's own nodes whose results nothing reads, which stay as they are.
    """

    capture: Capture
    config: Int8Config
    grad_enabled: bool = False
    native_cpu: bool = False
    sites: dict[fx.Node, Site] = dataclasses.field(default_factory=dict)
    unread: set[fx.Node] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.unread = {node for node in self.capture.graph.nodes if not node.users}

    def effects(self) -> Effects:
        """The effects in the graph as it is now; what their answers rely on is checked at each call (``overlaps``)."""
        return Effects(self.capture.graph, self.capture.apart)

    def call(
        self,
        before: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        like: fx.Node,
        value: Any = None,
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        """Insert a call before a node, with the provenance of ``like`` and a fake value (computed if not given)."""
        graph = self.capture.graph
        with graph.inserting_before(before):
            node = graph.call_function(target, args, kwargs)
        if value is None:
            values, named = argument_values(args), argument_values(kwargs or {})
            with self.capture.fake_mode, torch.no_grad():
                value = target(*values, **named)
        return self._described(node, like, value)

    def call_method(self, before: fx.Node, method: str, args: tuple[Any, ...], like: fx.Node, value: Any) -> fx.Node:
        """The same with a method of the first argument."""
        with self.capture.graph.inserting_before(before):
            return self._described(self.capture.graph.call_method(method, args), like, value)

    def _described(self, node: fx.Node, like: fx.Node, value: Any) -> fx.Node:
        node.meta = {k: v for k, v in like.meta.items() if k in _PROVENANCE}
        node.meta["val" if "val" in like.meta and "example_value" not in like.meta else "example_value"] = value
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put a node in another's place, its site and its being unread by the user included."""
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
        if old in self.sites:
            self.sites[new] = self.sites.pop(old)
        if old in self.unread:
            self.unread.add(new)


def argument_values(args: Any) -> Any:
    """A call's arguments, a tuple or a dict, with each node replaced by its fake value."""
    return fx.node.map_arg(args, meta_value)  # type: ignore[arg-type]


_PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "custom")
