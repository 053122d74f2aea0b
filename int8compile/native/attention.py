"""Which kernels compute ``int8compile::attention`` here, and where they are faster than PyTorch's attention.

The figures are those of ``python -m benchmarks.studies.prompt_attention``. Instruction sets that it has not run on are
not in the table, so ``attention="auto"`` leaves PyTorch's call there.
"""

from __future__ import annotations

import torch

#: kernels -> kind of call -> dtypes in which no shape was slower than PyTorch's, and most were faster
FASTER: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    # On an Emerald Rapids, one and two threads. A mask hides keys, which are left out; PyTorch multiplies them.
    "avx512": {
        "masked": (torch.float32, torch.bfloat16, torch.float16),
        "whole": (torch.bfloat16, torch.float16),
        "one query": (),
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
