"""A tensor's storage, and whether it is a fake."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from int8compile.torch_internals.dtensors import is_dtensor, local_of

#: whether a storage, given as ``torch.multiprocessing.reductions.StorageWeakRef.cdata``, has been freed; called for
#: every weight at every call of a model, so it is torch's own function
storage_expired = torch.UntypedStorage._expired


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share a storage, as long as it lives; of a DTensor, that of its shard.

    Raises:
        NotImplementedError, RuntimeError: a tensor that has none, such as a sparse one.
    """
    key: int = local_of(tensor).untyped_storage()._cdata
    return key


def wraps_tensors(tensor: torch.Tensor) -> bool:
    """Whether it is of a subclass whose values are in other tensors, and it is not known in which (as of DTensors)."""
    return is_traceable_wrapper_subclass(tensor) is not False and not is_dtensor(tensor)


def is_fake(value: object) -> TypeGuard[FakeTensor]:
    """Whether a value is a fake of a plain tensor, not of a subclass, and not wrapped by a transform of torch.func."""
    return type(value) is FakeTensor


def is_any_fake(value: object) -> TypeGuard[FakeTensor]:
    """Whether a value is a fake of any kind."""
    return isinstance(value, FakeTensor)


def new_fake_mode(shape_env: Any = None) -> Any:
    """A mode that makes fakes; with a ``ShapeEnv``, of symbolic sizes too."""
    return FakeTensorMode(shape_env=shape_env)
