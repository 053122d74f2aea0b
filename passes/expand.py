"""expand: PyTorch's fused attention calls become the operations they stand for, so that the linears in them are sites.

    (a) F.multi_head_attention_forward(q, k, v, ...)   -> its own Python body (nn.MultiheadAttention)
    (b) torch._native_multi_head_attention(...)        -> the same, for tensors that begin with the batch
    (c) torch._transformer_encoder_layer_fwd(...)      -> attention, feed-forward and norms (nn.TransformerEncoderLayer)

No numerics change beyond rounding. Left as they are: calls on nested tensors (padding taken out on the fly), calls
whose results are read otherwise than one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils import _pytree as pytree

from int8compile.graph.dump import meta_value
from int8compile.passes.analysis import transformed
from int8compile.passes.context import PassContext
from int8compile.torch_internals.graphs import FUSED_ATTENTION, FUSED_ENCODER_LAYER


def expand(graph: fx.Graph, context: PassContext) -> int:
    changes = 0
    left = transformed(graph)
    for target, body in FUSED.items():
        for node in graph.find_nodes(op="call_function", target=target):
            traced = None if node in left else _trace(node, body, context)
            if traced is not None:
                _inline(node, *traced, context)
                changes += 1
    return changes


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    need_weights: bool = True,
    average_attn_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``torch._native_multi_head_attention``: [B, L, E] to [B, L, E] and, if needed, the attention's weights."""
    q = query.transpose(0, 1)  # one tensor where there was one, which then has one projection for all three
    k = q if key is query else key.transpose(0, 1)
    v = k if value is key else value.transpose(0, 1)
    out, weights = functional.multi_head_attention_forward(
        q,
        k,
        v,
        embed_dim,
        num_head,
        qkv_weight,
        qkv_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=proj_weight,
        out_proj_bias=proj_bias,
        training=False,
        need_weights=need_weights,
        average_attn_weights=average_attn_weights,
        # 0: [L, L], 1: padding [B, L], 2: [B, heads, L, L]
        key_padding_mask=mask if mask_type == 1 else None,
        attn_mask=mask.flatten(0, 1) if mask is not None and mask_type == 2 else mask if mask_type == 0 else None,
    )
    return out.transpose(0, 1), weights


def _encoder_layer(
    src: torch.Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: torch.Tensor,
    qkv_bias: torch.Tensor,
    proj_weight: torch.Tensor,
    proj_bias: torch.Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: torch.Tensor,
    norm1_bias: torch.Tensor,
    norm2_weight: torch.Tensor,
    norm2_bias: torch.Tensor,
    ffn1_weight: torch.Tensor,
    ffn1_bias: torch.Tensor,
    ffn2_weight: torch.Tensor,
    ffn2_bias: torch.Tensor,
    mask: torch.Tensor | None = None,
    mask_type: int | None = None,
) -> torch.Tensor:
    """``torch._transformer_encoder_layer_fwd``: [B, L, E] to [B, L, E]."""

    def attend(x: torch.Tensor) -> torch.Tensor:
        weights = (qkv_weight, qkv_bias, proj_weight, proj_bias)
        return _attention(x, x, x, embed_dim, num_heads, *weights, mask, need_weights=False, mask_type=mask_type)[0]

    def feed_forward(x: torch.Tensor) -> torch.Tensor:
        activation = functional.gelu if use_gelu else functional.relu
        hidden = activation(functional.linear(x, ffn1_weight, ffn1_bias))
        return functional.linear(hidden, ffn2_weight, ffn2_bias)

    def norm1(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, (embed_dim,), norm2_weight, norm2_bias, eps)

    if norm_first:
        src = src + attend(norm1(src))
        return src + feed_forward(norm2(src))
    src = norm1(src + attend(src))
    return norm2(src + feed_forward(src))


#: calls that Dynamo puts into the graph whole, with the weights of several linears as arguments -> what they compute
FUSED: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.multi_head_attention_forward: functional.multi_head_attention_forward,
    FUSED_ATTENTION: _attention,
    FUSED_ENCODER_LAYER: _encoder_layer,
}


def _trace(node: fx.Node, body: Callable[..., Any], context: PassContext) -> tuple[fx.Graph, list[fx.Node]] | None:
    """The body as a graph, and the nodes that its inputs are; None where it has to stay as it is."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    inputs = list(dict.fromkeys(a for a in flat if isinstance(a, fx.Node)))
    values = [meta_value(a) for a in inputs]
    if not all(isinstance(v, torch.Tensor) and not v.is_nested for v in values):
        return None
    results = meta_value(node)
    if isinstance(results, (tuple, list)) and any(user.target is not operator.getitem for user in node.users):
        return None

    def call(*tensors: torch.Tensor) -> Any:
        given = dict(zip(inputs, tensors, strict=True))
        args, kwargs = pytree.tree_unflatten([given[a] if isinstance(a, fx.Node) else a for a in flat], spec)
        return body(*args, **kwargs)

    with context.capture.fake_mode, torch.no_grad():
        traced = make_fx(call, pre_dispatch=True)(*values)
    if traced.graph.find_nodes(op="get_attr"):
        return None
    return traced.graph, inputs


def _inline(node: fx.Node, body: fx.Graph, inputs: list[fx.Node], context: PassContext) -> None:
    """Put a traced body in a call's place."""
    new: dict[fx.Node, fx.Node] = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
    result: Any = None
    for inner in body.nodes:
        if inner.op == "output":
            result = fx.node.map_arg(inner.args[0], new.__getitem__)
        elif inner.op != "placeholder":
            args, kwargs = fx.node.map_arg((inner.args, inner.kwargs), new.__getitem__)  # type: ignore[misc]
            assert not kwargs or isinstance(kwargs, dict)
            new[inner] = context.call(node, inner.target, args, like=node, value=inner.meta["val"], kwargs=kwargs)
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
