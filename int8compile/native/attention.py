"""Which kernels compute ``int8compile::attention`` here, and where they are faster than PyTorch's attention.

The table is what ``python -m benchmarks.studies.prompt_attention`` found. CPUs that it has not run on, and instruction
sets that are not in the table, keep PyTorch's attention under ``attention="auto"``. ``FASTER`` is the place for another
table, measured on the machine at hand.
"""

from __future__ import annotations

import torch

#: kernels -> kind of call -> dtypes in which no shape of the study was slower than PyTorch's attention
FASTER: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    # An Emerald Rapids. masked: 1.1 to 5 times as fast; whole: 1.2 to 1.9, and in float32 0.6 to 1.3; one query, on one
    # thread and on two: 1.3 to 4.8, but for bfloat16 without groups on one thread, which is as fast (1.0).
    "avx512": {
        "masked": (torch.float32, torch.bfloat16, torch.float16),
        "whole": (torch.bfloat16, torch.float16),
        "one query": (torch.float32, torch.bfloat16, torch.float16),
    },
    # The same CPU with both sides held to AVX2. masked: 1.0 to 3.1; whole: 1.0 to 1.2; one query: bfloat16 6 to 12,
    # float16 3.0 to 4.8 and float32 1.1 to 1.8.
    "avx2": {
        "masked": (torch.float32, torch.bfloat16, torch.float16),
        "whole": (),
        "one query": (torch.float32, torch.bfloat16, torch.float16),
    },
}


def kernels(dtype: torch.dtype) -> str:
    """The name of the kernels that attend tensors of a dtype, such as ``avx512``; the CPU's library is loaded."""
    return str(torch.ops.int8compile_native.attention(dtype))


def is_faster(dtype: torch.dtype, kind: str) -> bool:
    """Whether the kernels in use are faster than PyTorch's attention.

    Args:
        kind: of call: ``masked``, with a mask or causal; ``whole``, without; ``one query``, which a decoded token has.
    """
    return dtype in FASTER.get(kernels(dtype), {}).get(kind, ())
