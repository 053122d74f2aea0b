"""What a pass is given beside the graph: options, the capture it lifts weights on, and where to write Reasons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from int8compile.config import Int8Config
from int8compile.graph.capture import Capture
from int8compile.graph.dump import meta_value
from int8compile.report import Site


@dataclasses.dataclass
class PassContext:
    """Shared by the passes of one run.

    Args:
        capture: the graph's inputs and lifted weights.
        config: the user's options.
        grad_enabled: whether gradients are recorded where the graph begins.
        sites: one for each linear, written by ``quantize``.
        inserted: the calls that passes made; all others are the user's own.
    """

    capture: Capture
    config: Int8Config
    grad_enabled: bool = False
    sites: dict[fx.Node, Site] = dataclasses.field(default_factory=dict)
    inserted: set[fx.Node] = dataclasses.field(default_factory=set)

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
        self.inserted.add(node)
        node.meta = {k: v for k, v in like.meta.items() if k in _PROVENANCE}
        if value is None:
            values = argument_values(args)
            with self.capture.fake_mode, torch.no_grad():
                value = target(*values)
        node.meta["val" if "val" in like.meta and "example_value" not in like.meta else "example_value"] = value
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Put a node in another's place; the old one's site is the new one's."""
        old.replace_all_uses_with(new)
        old.graph.erase_node(old)
        if old in self.sites:
            self.sites[new] = self.sites.pop(old)


def argument_values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A call's arguments with each node replaced by its fake value."""
    values: tuple[Any, ...] = fx.node.map_arg(args, meta_value)  # type: ignore[arg-type,assignment]
    return values


_PROVENANCE = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node", "custom")
