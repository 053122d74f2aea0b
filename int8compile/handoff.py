"""Hands a rewritten graph to inductor, with its options, the operators' bodies and the key of its caches."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import IO, Any

import torch
from torch import fx

from int8compile.config import Int8Config
from int8compile.errors import OptionValueError
from int8compile.native.providers import Provider
from int8compile.ops._library import REFERENCES
from int8compile.ops.int_product import cpu_multiplies_int8
from int8compile.torch_internals import aot, inductor


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Int8Config, provider: Provider
) -> Callable[..., Any]:
    """Compile a rewritten graph with inductor.

    With native kernels our operators stay calls; without, inductor compiles their reference bodies in their place and
    fuses them with what surrounds them.
    """
    bodies = {} if provider.native else REFERENCES
    tag = cache_tag(config, provider.native)
    return inductor.compile_graph(gm, inputs, patches=_patches(config), bodies=bodies, tag=tag)


def compile_package(
    program: torch.export.ExportedProgram,
    path: str | IO[bytes],
    config: Int8Config,
    *,
    native: bool,
    metadata: Mapping[str, str],
    march: str | None,
    vector_bits: int | None,
) -> None:
    """Compile an exported program into an AOTInductor package.

    Args:
        path: of the package, or a file to write it to.
        native: whether our operators stay calls. If not, the package holds their reference bodies compiled.
        metadata: texts that go into the package.
        march, vector_bits: the CPU that generated code is compiled for, as in ``aot.compile_package``.
    """
    aot.compile_package(
        program if native else program.run_decompositions(dict(REFERENCES)),
        path,
        patches=_patches(config),
        metadata=metadata,
        tag=cache_tag(config, native),
        march=march,
        vector_bits=vector_bits,
    )


def _patches(config: Int8Config) -> dict[str, Any]:
    """Inductor's options that the user's mode and options stand for."""
    names = inductor.option_names()
    for name in config.inductor:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f", such as {near[0]!r}" if near else " (torch._inductor.list_options() has them)"
            raise OptionValueError("inductor", dict(config.inductor), f"names of inductor's own options{hint}")
    return {**inductor.mode_options(config.mode or "default"), **config.inductor}


def cache_tag(config: Int8Config, native: bool) -> str:
    """What decides a compiled graph beside the graph and inductor's options: our options, sources and operators.

    None of it is in the keys of inductor's caches by itself.
    """
    route = "native" if native else f"reference, int8={cpu_multiplies_int8()}"
    parts = f"{sources_digest()} {config.fingerprint()} {route}"
    return f"int8compile-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"


@functools.cache
def sources_digest() -> str:
    """Hash of this package's sources, native ones included."""
    digest = hashlib.sha256()
    for package in ("int8compile", "int8compile.passes", "int8compile.csrc"):
        for path in sorted(_files(resources.files(package)), key=lambda p: str(p)):
            digest.update(str(path.name).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _files(folder: Any) -> list[Any]:
    found = []
    for path in folder.iterdir():
        if path.is_dir() and path.name != "__pycache__":
            found += _files(path)
        elif path.name.endswith((".py", ".cpp", ".h", ".cu", ".cuh")):
            found.append(path)
    return found
