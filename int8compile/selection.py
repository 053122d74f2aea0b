"""The rules by which a linear stays in float: by its shape, dtype and name.

The same rules serve the compiler pass, which sees graph nodes, and ``quantize_``, which sees modules. What only one
of the two can know (a weight changed inside a graph, a module with a forward of its own) is decided there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from int8compile.config import WEIGHTS_ONLY, Int8Config
from int8compile.limits import FLOAT_DTYPES, MAX_IN_FEATURES
from int8compile.report import Reason, Site

#: names of output embeddings in transformers' models; weights tied to an embedding are found by sharing
OUTPUT_EMBEDDINGS = ("lm_head", "embed_out")

#: what a weight may be: a subclass can mean anything by a product
PLAIN_TENSORS = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}


def shape_refusal(shape: tuple[object, ...], in_features: int) -> tuple[Reason, str] | None:
    """Why a weight of this shape cannot be int8, or None."""
    if len(shape) != 2 or in_features > MAX_IN_FEATURES:
        return Reason.SHAPE, f"{list(shape)}"
    return None


def dtype_refusal(dtype: torch.dtype) -> tuple[Reason, str] | None:
    """Why a linear of this dtype stays as it is, or None."""
    return None if dtype in FLOAT_DTYPES else (Reason.DTYPE, str(dtype).removeprefix("torch."))


def name_refusal(path: str, is_output_embedding: bool, config: Int8Config) -> tuple[Reason, str] | None:
    """Why a linear with this module path stays in float, or None.

    Args:
        is_output_embedding: what is known beside its name, such as a weight shared with an embedding.
    """
    is_output = is_output_embedding or path.rsplit(".", 1)[-1] in OUTPUT_EMBEDDINGS
    if is_output and config.skip_output_embeddings and weight_only_by(path, config) is None:
        return Reason.OUTPUT_EMBEDDING, ""
    pattern = skipped_by(path, config)
    return None if pattern is None else (Reason.SKIPPED, pattern)


def size_refusal(in_features: int, out_features: int, config: Int8Config) -> tuple[Reason, str] | None:
    """Why a linear of this size stays in float, or None."""
    if min(in_features, out_features) < config.min_features:
        return Reason.TOO_SMALL, f"min_features={config.min_features}"
    return None


def skipped_by(path: str, config: Int8Config) -> str | None:
    """The pattern of ``llm_int8_skip_modules`` that names this module or one above it, or None."""
    return next((pattern for pattern in config.llm_int8_skip_modules if names(pattern, path)), None)


def weight_only_by(path: str, config: Int8Config) -> str | None:
    """The pattern of ``llm_int8_weight_only_modules`` that names this module or one above it, or None."""
    return next((pattern for pattern in config.llm_int8_weight_only_modules if names(pattern, path)), None)


def outliers(config: Int8Config, *paths: str) -> tuple[float, str]:
    """The threshold and the outlier policy of ``int8compile.linear`` for a module, which may stand at several paths."""
    if config.activation == "float" or any(weight_only_by(path, config) is not None for path in paths):
        return 0.0, WEIGHTS_ONLY
    return config.llm_int8_threshold, config.outlier_policy


def detail(outlier_policy: str, *others: str) -> str:
    """What a report says of an int8 linear beside that."""
    return ", ".join(filter(None, (*others, "weights only" if outlier_policy == WEIGHTS_ONLY else "")))


def names(pattern: str, path: str) -> bool:
    """Whether a pattern (a path, a dotted suffix of one, or a shell pattern) names a module or one above it."""
    parts = path.split(".")
    above = (".".join(parts[: i + 1]) for i in range(len(parts)))
    return any(a == pattern or a.endswith(f".{pattern}") or fnmatch.fnmatchcase(a, pattern) for a in above)


def unmatched(config: Int8Config, sites: Sequence[Site]) -> tuple[str, ...]:
    """Entries of the lists of modules that name none of these linears: typos, most likely."""
    patterns = dict.fromkeys((*config.llm_int8_skip_modules, *config.llm_int8_weight_only_modules))
    return tuple(p for p in patterns if not any(names(p, site.path) for site in sites))
