"""What Dynamo and AOTAutograd say about the running compile, and torch's structured trace."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext
from torch._logging._internal import trace_structured

from int8compile.torch_internals.dtensors import local_of
from int8compile.torch_internals.tensors import is_any_fake, new_fake_mode


def fake_mode_of(values: Iterable[object]) -> Any:
    """The fake mode of the first fake among values, a DTensor's shard too; a new one if there is none."""
    for value in values:
        value = local_of(value) if isinstance(value, torch.Tensor) else value
        if is_any_fake(value):
            return value.fake_mode
    return new_fake_mode()


def static_inputs(like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Example inputs for lifted weights: fakes with static shapes, of the mode that AOTAutograd will trace in.

    Dynamo gives backends a fresh mode, not the one its graph's meta is in. Real tensors would not do: AOTAutograd
    would give them symbolic sizes that no guard can be made for.
    """
    context = TracingContext.try_get()
    with (context.fake_mode if context is not None else None) or contextlib.nullcontext():
        return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in like]


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """Put a text into the structured trace (``TORCH_TRACE``), where tlparse shows it with the compile's own."""
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)


def compile_id() -> str:
    """``3/1``: frame 3, second compile; ``-`` outside of Dynamo."""
    current = CompileContext.current_compile_id()
    return "-" if current is None else str(current)


def graph_break_of(gm: fx.GraphModule) -> tuple[str, str] | None:
    """Why and where Dynamo ended this graph early, if it did."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    location = f"{frame.filename}:{frame.lineno} in {frame.name}" if frame is not None else "unknown"
    return str(reason.reason).strip(), location


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
