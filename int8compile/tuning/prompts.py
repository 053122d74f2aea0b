"""The tunable ``attend``: who computes attention of many queries, by dtype, kind and heads (``passes/attend.py``).

A prompt of 128 tokens; with a mask, that of a static cache of 160 positions.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn import functional

from int8compile.native import tuned
from int8compile.ops import attention
from int8compile.passes.attend import NATIVE, TORCH, TUNABLE, choice_keys, default_form, query_blocks
from int8compile.tuning.measure import Case, Run
from int8compile.tuning.request import Heads, Request

_QUERIES, _CACHE = 128, 160


def cases(request: Request) -> Iterator[Case]:
    """One for each number of heads, dtype and kind of call."""
    threads = torch.get_num_threads()
    for dtype, heads, kind in itertools.product(request.dtypes, request.attentions, ("masked", "whole")):
        where = tuned.where_of(**choice_keys(dtype, kind, *heads))
        label = f"{heads[0]}/{heads[1]} heads of {heads[2]}, {kind}, {str(dtype).removeprefix('torch.')}"
        default = default_form(dtype, kind, heads[0], heads[1], query_blocks(_QUERIES), threads)
        yield Case(TUNABLE, where, label, default, functools.partial(_prepare, heads, dtype, kind))


def _prepare(shape: Heads, dtype: torch.dtype, kind: str) -> Mapping[str, Run]:
    heads, kv_heads, width = shape
    keys = _CACHE if kind == "masked" else _QUERIES
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, _QUERIES, width, generator=generator).to(dtype)
    key, value = (torch.randn(1, kv_heads, keys, width, generator=generator).to(dtype) for _ in range(2))
    hidden = torch.arange(keys) > torch.arange(_QUERIES)[:, None]
    mask = torch.zeros(1, 1, _QUERIES, keys, dtype=dtype).masked_fill(hidden, -torch.inf) if kind == "masked" else None
    calls: dict[str, Callable[[], object]] = {
        TORCH: lambda: functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=heads != kv_heads),
        NATIVE: lambda: attention(query, key, value, mask, width**-0.5),
    }

    def run(form: str, count: int) -> None:
        for _ in range(count):
            calls[form]()

    return {form: functools.partial(run, form) for form in calls}
