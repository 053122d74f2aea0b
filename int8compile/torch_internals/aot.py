"""AOTInductor's packages: making one, reading what is written in it, loading it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from torch._inductor import cpp_builder

from int8compile.torch_internals.inductor import in_cache_keys


def compile_package(
    program: torch.export.ExportedProgram,
    path: str | IO[bytes],
    *,
    patches: Mapping[str, Any],
    metadata: Mapping[str, str],
    tag: str,
    march: str | None,
    vector_bits: int | None,
) -> None:
    """Compile an exported program into an AOTInductor package.

    Args:
        path: of the package, or a file to write it to.
        patches: inductor's own options.
        metadata: texts that go into the package.
        tag: as for ``inductor.compile_graph``.
        march: the CPU that generated code is compiled for, as compilers name it; None: this one.
        vector_bits: width of the vectors that inductor writes its loops with; None: as wide as they are here.
    """
    patches = dict(patches)
    patches["aot_inductor.metadata"] = {**patches.get("aot_inductor.metadata", {}), **metadata}
    if _writes(program):
        # Else a buffer of zeros is taken for a constant, though the program writes to it: every call would begin anew
        # (PyTorch issue 165444).
        patches["joint_graph_constant_folding"] = False
    if vector_bits is not None:
        patches["cpp.simdlen"] = vector_bits
    with in_cache_keys(tag), _compiled_for(march), warnings.catch_warnings():
        # torch 2.13 copies its own tree specs in a way that it warns of.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=patches)


def _writes(program: torch.export.ExportedProgram) -> bool:
    """Whether a program changes any tensor; only one of its buffers could be of use."""
    schemas = [node.target._schema for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return bool(program.graph_signature.buffers_to_mutate) or any(schema.is_mutable for schema in schemas)


@contextlib.contextmanager
def _compiled_for(march: str | None) -> Iterator[None]:
    """Within the context: generated C++ is compiled for that CPU. torch 2.11 has no option for it."""
    settings = torch._inductor.config.cpp
    if march is None:
        yield
    elif hasattr(settings, "march"):
        with torch._inductor.config.patch({"cpp.march": march}):
            yield
    else:
        original = cpp_builder._get_optimization_cflags

        def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
            compiling, linking = original(*args, **kwargs)
            return [f"march={march}" if flag == "march=native" else flag for flag in compiling], linking

        cpp_builder._get_optimization_cflags = flags
        try:
            yield
        finally:
            cpp_builder._get_optimization_cflags = original


def package_metadata(path: str) -> dict[str, str]:
    """What is written in a package beside its code; the code is not loaded.

    Raises:
        RuntimeError: it cannot be read.
    """
    found: dict[str, str] = torch._C._aoti.AOTIModelPackageLoader.load_metadata_from_package(path, "model")  # type: ignore[attr-defined]
    return found


def load_package(path: str, vector_bits: int | None) -> Any:
    """A package's model, which is called as the exported program is.

    Args:
        vector_bits: that it was compiled for. torch compares the instruction set that it was
            compiled with to the one that it would compile with itself, and warns of what is no mistake.
    """
    patch = {} if vector_bits is None else {"cpp.simdlen": vector_bits}
    with torch._inductor.config.patch(patch):
        return torch._inductor.aoti_load_package(path)
