"""``attention``: softmax(scale * query key^T + mask) value, for inference with many queries on CPUs.

PyTorch's ``scaled_dot_product_attention``, which is the reference, with fewer liberties: no dropout, no broadcast
batch, a scale that is given, and no gradient. Query heads share key/value heads in groups: head h reads key/value head
h // (H // Hkv).

Native kernels (``csrc/cpu/attention.h``) leave out what a mask hides where that changes nothing: infinite and NaN keys
and values reach the output through a mask, as they do in PyTorch's; under ``is_causal`` it depends on the kernels and
sizes whether they reach the rows before them. A row whose keys are all hidden is 0. A score of
+infinity makes its row NaN; PyTorch's CPU kernel (2.13) makes it 0 where tensors have 16 bits.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from int8compile.limits import FLOAT_DTYPES
from int8compile.ops._library import LIBRARY, check, define
from int8compile.torch_internals.operators import below_autograd


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> None:
    op = "attention"
    check(query.dtype in FLOAT_DTYPES, op, f"query has dtype {query.dtype}; expected float32, float16 or bfloat16")
    check(query.dim() == 4, op, f"query is {list(query.shape)}; expected [B, H, M, D]")
    batch, heads, queries, width = query.shape
    fits = key.dim() == 4 and key.shape[0] == batch and key.shape[3] == width
    fits = fits and (heads % key.shape[1] == 0 if key.shape[1] != 0 else heads == 0)
    expected = "[B, Hkv, N, D] of its dtype, H being a multiple of Hkv"
    check(fits and _goes_with(key, query), op, f"key is {_kind(key)}; for query {_kind(query)} expected {expected}")
    fits = value.dim() == 4 and tuple(value.shape[:3]) == tuple(key.shape[:3])
    expected = "[B, Hkv, N, Dv] of its dtype, as key is"
    check(
        fits and _goes_with(value, query), op, f"value is {_kind(value)}; for query {_kind(query)} expected {expected}"
    )
    if mask is None:
        return
    check(not is_causal, op, "is_causal=True and a mask; expected one of the two")
    sizes = (batch, heads, queries, key.shape[2])
    fits = 2 <= mask.dim() <= 4 and all(m in (n, 1) for m, n in zip(mask.shape[::-1], sizes[::-1], strict=False))
    check(
        fits and mask.dtype in (torch.bool, query.dtype) and mask.device == query.device,
        op,
        f"mask is {_kind(mask)}; expected bool or {query.dtype} on {query.device}, "
        f"of 2 to 4 dimensions that broadcast to {list(sizes)}",
    )


def _goes_with(tensor: torch.Tensor, query: torch.Tensor) -> bool:
    return tensor.dtype == query.dtype and tensor.device == query.device


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


def _reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    out = torch.empty_like(_fake(query, key, value, mask, scale, is_causal))
    grouped = query.shape[1] != key.shape[1]
    attend = functional.scaled_dot_product_attention
    return out.copy_(attend(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped))


attention = define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal=False) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
)


def _without_gradient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> torch.Tensor:
    tensors = [tensor for tensor in (query, key, value, mask) if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise NotImplementedError(
            "int8compile::attention has no gradient, and an operand needs one; call it under torch.no_grad(), "
            "or torch.nn.functional.scaled_dot_product_attention"
        )
    with below_autograd():
        out: torch.Tensor = attention(query, key, value, mask, scale, is_causal)
    return out


LIBRARY.impl("attention", _without_gradient, "Autograd")
