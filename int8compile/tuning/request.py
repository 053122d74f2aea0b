"""What to measure for: shapes that are given, those of a model's graphs, or shapes that many models have."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from int8compile.config import WEIGHTS_ONLY
from int8compile.errors import OptionValueError
from int8compile.explanation import each_graph
from int8compile.graph.capture import Capture
from int8compile.graph.dump import meta_tensor
from int8compile.limits import MAX_IN_FEATURES
from int8compile.ops import attention
from int8compile.passes.analysis.arguments import arguments
from int8compile.passes.analysis.attentions import ATTENTION
from int8compile.report import GraphReport

Shape = tuple[int, int]
#: query heads, key/value heads, and the width of a head
Heads = tuple[int, int, int]

_LARGEST_WEIGHT = 1 << 31


@dataclasses.dataclass(frozen=True)
class Request:
    """Shapes [K, N] of int8 products, heads of attentions, and the dtypes they are in."""

    products: tuple[Shape, ...] = ()
    attentions: tuple[Heads, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


#: Where nothing is said: of SmolLM2-135M, Llama-3.2-1B, Llama-2-7B and GPT-2; q/k/v and gate/up are one product
COMMON = Request(
    products=(
        (576, 960), (576, 3072), (1536, 576), (768, 2304), (768, 3072), (3072, 768), (2048, 2048), (2048, 3072),
        (2048, 16384), (8192, 2048), (4096, 4096), (4096, 12288), (4096, 22016), (11008, 4096),
    ),
    attentions=((9, 3, 64), (32, 8, 64), (32, 8, 128), (32, 32, 128), (12, 12, 64)),
)  # fmt: skip


def shapes(text: str) -> tuple[Shape, ...]:
    """The shapes K x N in ``"576x1536,2048x2048"``.

    Raises:
        OptionValueError: it holds anything else, or a shape that is too large.
    """
    matches = [re.fullmatch(r"\s*(\d{1,9})x(\d{1,9})\s*", word) for word in text.split(",")]
    if not all(matches):
        raise OptionValueError(
            "shapes", text, "K x N of weights with commas between them, such as '576x1536,2048x2048'"
        )
    return checked_shapes([(int(match[1]), int(match[2])) for match in matches if match])


def checked_shapes(given: Sequence[Shape]) -> tuple[Shape, ...]:
    """Each shape once.

    Raises:
        OptionValueError: one that is none, or of a weight of more than 2 GiB.
    """
    for shape in given:
        numbers = isinstance(shape, (tuple, list)) and len(shape) == 2 and all(type(size) is int for size in shape)
        if not numbers or not (0 < shape[0] <= MAX_IN_FEATURES and 0 < shape[1] <= _LARGEST_WEIGHT // shape[0]):
            raise OptionValueError(
                "shapes",
                list(given),
                f"(K, N) of weights of at most 2 GiB, K up to {MAX_IN_FEATURES}; {shape!r} is none",
            )
    return tuple(dict.fromkeys((k, n) for k, n in given))


def of_model(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], options: object) -> Request:
    """What a model's graphs multiply and attend once they are rewritten, joined linears being one product.

    Raises:
        CaptureError, OptionNameError, OptionValueError: as ``explain`` does.
    """
    products: dict[Shape, None] = {}
    attentions: dict[Heads, None] = {}
    dtypes: dict[torch.dtype, None] = {}

    def look(captured: Capture, report: GraphReport) -> None:
        for node in captured.graph.nodes:
            if (shape := _product(node)) is not None:
                products[shape] = None
            if (heads := _heads(node)) is not None:
                attentions[heads] = None
            if shape is not None or heads is not None:
                value = meta_tensor(node)
                dtypes.update({} if value is None else {value.dtype: None})

    with torch.no_grad():
        each_graph(model, args, kwargs, options, look)
    return Request(tuple(products), tuple(attentions), tuple(dtypes) or Request.dtypes)


def joined(requests: Iterable[Request]) -> Request:
    """All that several ask for, each once."""
    made = Request((), (), ())
    for part in requests:
        made = Request(
            tuple(dict.fromkeys(made.products + part.products)),
            tuple(dict.fromkeys(made.attentions + part.attentions)),
            tuple(dict.fromkeys(made.dtypes + part.dtypes)),
        )
    return made


def _product(node: fx.Node) -> Shape | None:
    """[K, N] of an int8 product on a CPU with a weight whose shape does not change."""
    ops = torch.ops.int8compile
    if node.target not in (ops.linear.default, ops.scaled_mm.default):
        return None
    given = arguments(node)
    weight = meta_tensor(given["weight"])
    if given.get("outlier_policy") == WEIGHTS_ONLY:  # multiplied by other kernels
        return None
    if weight is None or weight.device.type != "cpu" or not all(isinstance(size, int) for size in weight.shape):
        return None
    n, k = weight.shape
    return (k, n) if 0 < k * n <= _LARGEST_WEIGHT else None


def _heads(node: fx.Node) -> Heads | None:
    """Of an attention on a CPU, however many queries it has here."""
    attends = node.target in ATTENTION or node.target is attention
    given = arguments(node) if attends else {}
    query, key = (meta_tensor(given[name]) if given else None for name in ("query", "key"))
    if query is None or key is None or query.dim() != 4 or key.dim() != 4 or query.device.type != "cpu":
        return None
    heads, kv_heads, width = query.shape[1], key.shape[1], query.shape[3]
    if not all(isinstance(size, int) and size > 0 for size in (heads, kv_heads, width)) or heads % kv_heads != 0:
        return None
    return heads, kv_heads, width
