"""The hand-off to inductor, and everything else that touches torch's private interfaces.

Whatever breaks with a new torch release breaks here.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from typing import IO, Any

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch._inductor import cpp_builder, list_mode_options, list_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch._logging._internal import trace_structured

from int8compile.config import Int8Config
from int8compile.cpu_targets import CpuTarget
from int8compile.errors import OptionValueError
from int8compile.graph_text import meta_tensor, meta_value
from int8compile.native import Provider
from int8compile.ops._library import REFERENCES
from int8compile.ops.int_product import cpu_multiplies_int8
from int8compile.report import GraphBreak


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The fake mode of the values in a graph's meta; a new one if they have none."""
    for node in gm.graph.nodes:
        if isinstance(value := meta_value(node), torch._subclasses.FakeTensor):
            return value.fake_mode
    return torch._subclasses.FakeTensorMode()


def static_inputs(nodes: Sequence[fx.Node]) -> list[Any]:
    """Example inputs for lifted weights: fakes with static shapes, of the mode that AOTAutograd will trace in.

    Dynamo gives backends a fresh mode, not the one its graph's meta is in. Real tensors would not do: AOTAutograd
    would give them symbolic sizes that no guard can be made for.
    """
    context = TracingContext.try_get()
    values = [meta_tensor(node) for node in nodes]
    with (context.fake_mode if context is not None else None) or contextlib.nullcontext():
        return [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values if v is not None]


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], config: Int8Config, provider: Provider
) -> Callable[..., Any]:
    """Compile a rewritten graph with inductor.

    With native kernels our operators stay calls; without, inductor compiles their reference bodies in their place and
    fuses them with what surrounds them. Which it is, like everything else that decides the result beside the graph
    itself (our sources and options), is not in the keys of inductor's caches, so a tag puts it there.
    """
    decompositions = None if provider.native else {**select_decomp_table(), **REFERENCES}
    patches = _patches(config)
    with torch.compiler.config.patch(cache_key_tag=_cache_tag(config, provider.native)):  # type: ignore[attr-defined]
        compiled: Any = compile_fx(gm, inputs, config_patches=patches, decompositions=decompositions)
    function: Callable[..., Any] = compiled
    return function


def _patches(config: Int8Config) -> dict[str, Any]:
    """Inductor's options that the user's mode and options stand for."""
    for name in config.inductor:
        if name not in list_options():
            near = difflib.get_close_matches(str(name), list_options(), n=1)
            hint = f", such as {near[0]!r}" if near else " (torch._inductor.list_options() has them)"
            raise OptionValueError("inductor", dict(config.inductor), f"names of inductor's own options{hint}")
    return {**list_mode_options(config.mode or "default"), **config.inductor}


def compile_package(
    program: torch.export.ExportedProgram,
    path: str | IO[bytes],
    config: Int8Config,
    *,
    native: bool,
    target: CpuTarget,
    metadata: Mapping[str, str],
) -> None:
    """Compile an exported program into an AOTInductor package.

    Args:
        path: of the package, or a file to write it to.
        native: whether our operators stay calls. If not, the package holds their reference bodies compiled.
        target: the CPU that generated code is compiled for.
        metadata: texts that go into the package.
    """
    if not native:
        program = program.run_decompositions(dict(REFERENCES))
    patches = _patches(config)
    patches["aot_inductor.metadata"] = {**patches.get("aot_inductor.metadata", {}), **metadata}
    if _writes(program):
        # Else a buffer of zeros is taken for a constant, though the program writes to it: every call would begin anew
        # (PyTorch issue 165444).
        patches["joint_graph_constant_folding"] = False
    if target.vector_bits is not None:
        patches["cpp.simdlen"] = target.vector_bits
    tag = _cache_tag(config, native)
    with torch.compiler.config.patch(cache_key_tag=tag), _compiled_for(target), warnings.catch_warnings():  # type: ignore[attr-defined]
        # torch 2.13 copies its own tree specs in a way that it warns of.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=patches)


def _writes(program: torch.export.ExportedProgram) -> bool:
    """Whether a program changes any tensor; only one of its buffers could be of use."""
    schemas = [node.target._schema for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    return bool(program.graph_signature.buffers_to_mutate) or any(schema.is_mutable for schema in schemas)


@contextlib.contextmanager
def _compiled_for(target: CpuTarget) -> Iterator[None]:
    """Within the context: generated C++ is compiled for that CPU. torch 2.11 has no option for it."""
    settings = torch._inductor.config.cpp
    if target.march is None:
        yield
    elif hasattr(settings, "march"):
        with torch._inductor.config.patch({"cpp.march": target.march}):
            yield
    else:
        original = cpp_builder._get_optimization_cflags

        def flags(*args: Any, **kwargs: Any) -> tuple[list[str], list[str]]:
            compiling, linking = original(*args, **kwargs)
            return [f"march={target.march}" if flag == "march=native" else flag for flag in compiling], linking

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
        vector_bits: of the ``CpuTarget`` that it was compiled for. torch compares the instruction set that it was
            compiled with to the one that it would compile with itself, and warns of what is no mistake.
    """
    patch = {} if vector_bits is None else {"cpp.simdlen": vector_bits}
    with torch._inductor.config.patch(patch):
        return torch._inductor.aoti_load_package(path)


def _cache_tag(config: Int8Config, native: bool) -> str:
    outer: str = torch.compiler.config.cache_key_tag
    route = "native" if native else f"reference, int8={cpu_multiplies_int8()}"
    parts = f"{sources_digest()} {config.fingerprint()} {route}"
    return f"{outer} int8compile-{hashlib.sha256(parts.encode()).hexdigest()[:16]}".strip()


@functools.cache
def sources_digest() -> str:
    """Hash of this package's sources, native ones included."""
    digest = hashlib.sha256()
    for package in ("int8compile", "int8compile.ops", "int8compile.passes", "int8compile.csrc"):
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


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace (``TORCH_TRACE``), where tlparse shows it with the compile's own."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def compile_id() -> str:
    """``3/1``: frame 3, second compile; ``-`` outside of Dynamo."""
    current = CompileContext.current_compile_id()
    return "-" if current is None else str(current)


def graph_break_of(gm: fx.GraphModule) -> GraphBreak | None:
    """Why and where Dynamo ended this graph early, if it did."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    location = f"{frame.filename}:{frame.lineno} in {frame.name}" if frame is not None else "unknown"
    return GraphBreak(str(reason.reason).strip(), location)


def compiled_callable() -> Any:
    """What the user handed to ``torch.compile`` in the call that is compiling now, weakly; None if unknown.

    Graphs on both sides of a graph break are compiled one by one, and this is what they have in common. It stands in
    Dynamo's wrapper, further up this thread's stack.
    """
    frame = sys._getframe()
    found = None
    while frame is not None:
        if frame.f_code.co_name in ("compile_wrapper", "_fn") and frame.f_code.co_filename.endswith("eval_frame.py"):
            found = frame.f_locals.get("fn", found)
        frame = frame.f_back  # type: ignore[assignment]
    owner = getattr(found, "__self__", found)
    try:
        return None if owner is None else weakref.ref(owner)
    except TypeError:
        return None
