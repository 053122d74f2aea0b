"""The tunable ``fold_queries``: the form of an attention of one query, by dtype and heads (``passes/fold_queries.py``).

A decoded token's, with the mask of a static cache of 640 positions, of which four in five are in use.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch.nn import functional

from int8compile.native import tuned
from int8compile.passes.fold_queries import AS_IT_IS, FOLDED, TUNABLE, TWO_ROWS, choice_keys, default_form, forms
from int8compile.tuning.measure import Case, Run
from int8compile.tuning.request import Heads, Request

_CACHE = 640


def cases(request: Request) -> Iterator[Case]:
    """One for each number of heads and dtype."""
    threads = torch.get_num_threads()
    for dtype, (heads, kv_heads, width) in itertools.product(request.dtypes, request.attentions):
        groups = heads // kv_heads
        where = tuned.where_of(**choice_keys(dtype, heads, kv_heads))
        label = f"{heads}/{kv_heads} heads of {width}, {str(dtype).removeprefix('torch.')}"
        default = default_form(dtype, heads, groups, threads)
        yield Case(TUNABLE, where, label, default, functools.partial(_prepare, (heads, kv_heads, width), dtype))


def _prepare(shape: Heads, dtype: torch.dtype) -> Mapping[str, Run]:
    heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, 1, width, generator=generator).to(dtype)
    key, value = (torch.randn(1, kv_heads, _CACHE, width, generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(1, 1, 1, _CACHE, dtype=dtype).masked_fill(torch.arange(_CACHE) >= _CACHE * 4 // 5, -torch.inf)
    attend, groups = functional.scaled_dot_product_attention, heads // kv_heads
    calls: dict[str, Callable[[], object]] = {
        AS_IT_IS: lambda: attend(query, key, value, mask, enable_gqa=groups > 1),
        FOLDED: lambda: attend(query.squeeze(2).unflatten(1, (-1, groups)), key, value, mask),
        TWO_ROWS: lambda: attend(query.expand(-1, -1, 2, -1), key, value, mask).narrow(2, 0, 1),
    }

    def run(form: str, count: int) -> None:
        for _ in range(count):
            calls[form]()

    return {form: functools.partial(run, form) for form in forms(groups)}
