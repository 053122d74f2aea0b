"""PyTorch's fused attention calls, which hold several linears, and what each of them computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional


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
    torch._native_multi_head_attention: _attention,
    torch._transformer_encoder_layer_fwd: _encoder_layer,
}
