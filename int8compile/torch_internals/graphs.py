"""The private functions that stand in graphs as targets, and what Dynamo and FX keep on graphs beside the nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

#: what ``torch.set_grad_enabled`` is in a graph
SET_GRAD_ENABLED = torch._C._set_grad_enabled
#: what ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` call in ``eval()``
FUSED_ATTENTION = torch._native_multi_head_attention
FUSED_ENCODER_LAYER = torch._transformer_encoder_layer_fwd


def empty_like(graph: fx.Graph) -> fx.Graph:
    """A new graph of the same kind."""
    return fx.Graph(tracer_cls=graph._tracer_cls)


def source_of(placeholder: fx.Node) -> Any:
    """Where in the user's program Dynamo found an input; None if it is none of Dynamo's."""
    return getattr(placeholder, "_dynamo_source", None)


def is_of_fsdp(source: Any) -> bool:
    """Whether an input belongs to a module that FSDP manages, which may write its memory anew before each call."""
    kind = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind  # a method before torch 2.12
    return kind is not None and bool(kind.is_fsdp_module())


def set_source(placeholder: fx.Node, source: Any) -> None:
    """Say where an input comes from, which AOTAutograd reads of every one of Dynamo's; None for one of our own."""
    placeholder._dynamo_source = source  # type: ignore[attr-defined]
