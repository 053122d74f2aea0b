"""Each provider of int8 kernels that this CPU runs, and what all of them are to agree on."""

from collections.abc import Iterator

import torch

from int8compile.native import loader


def each_provider() -> Iterator[str]:
    """Each provider of this CPU, chosen while it is yielded."""
    loader.load("cpu")
    try:
        for name in torch.ops.int8compile_native.isas().split():
            torch.ops.int8compile_native.set_isa(name)
            yield name
    finally:
        torch.ops.int8compile_native.set_isa("auto")


def assert_same_bits(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert ((got == want) | (got.isnan() & want.isnan())).all()
