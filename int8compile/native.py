"""Native code: which provider computes the int8 products, and building what csrc/ holds at first use.

``load()`` compiles C++ with ``torch.utils.cpp_extension.load_inline`` and ninja into a folder named by a hash of the
sources, the flags and the torch version, so that a change builds anew and everything else is found ready.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any

import torch

from int8compile.errors import KernelBuildError

_FLAGS = ["-O3"]


def choose_provider(kernels: str, example_inputs: Sequence[Any]) -> str:
    """Who computes the int8 products for tensors such as these, for ``kernels`` = auto, native or reference.

    Raises:
        KernelBuildError: ``"native"``, and there are no native kernels for the device.
    """
    devices = sorted({t.device.type for t in example_inputs if isinstance(t, torch.Tensor)}) or ["cpu"]
    if kernels == "native":
        raise KernelBuildError(
            f"kernels='native': this version has no native kernels for {', '.join(devices)}; use kernels='auto'"
        )
    return f"reference ({', '.join(devices)})"


@functools.cache
def load(source: str) -> None:
    """Build (if need be) and load one C++ file of ``int8compile.csrc``, which registers its operators.

    Args:
        source: path below csrc, such as ``common/release_storage.cpp``.

    Raises:
        KernelBuildError: no compiler or no ninja, or the compiler's own message.
    """
    from torch.utils.cpp_extension import load_inline

    path = resources.files("int8compile.csrc").joinpath(source)
    text = path.read_text()
    digest = hashlib.sha256(f"{text} {_FLAGS} {torch.__version__}".encode()).hexdigest()[:12]
    name = source.rsplit("/", 1)[-1].removesuffix(".cpp")
    try:
        load_inline(
            f"int8compile_{name}_{digest}",
            cpp_sources=[f'#line 1 "csrc/{source}"\n{text}'],
            extra_cflags=_FLAGS,
            is_python_module=False,
            no_implicit_headers=True,
        )
    except (RuntimeError, OSError) as error:
        raise KernelBuildError(
            f"could not build csrc/{source} (a C++ compiler and ninja are needed):\n{error}"
        ) from error


def release_storage() -> Callable[[torch.Tensor], None]:
    """A function that frees a tensor's storage such that touching it later raises an error that says so.

    Resizing the storage alone would not do: eager operators that read it crash the process.

    Raises:
        KernelBuildError: the C++ behind it cannot be built.
    """
    load("common/release_storage.cpp")
    op = torch.ops.int8compile_native.release_storage.default

    def release(tensor: torch.Tensor) -> None:
        op(tensor, _RELEASED)

    return release


_RELEASED = (
    "int8compile: this float weight was freed by release_weights=True; only compiled code can run it now. "
    "int8compile.restore_weights_(model) brings back its int8 values as floats; reload the model for the originals."
)
