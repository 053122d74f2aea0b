"""The rules by which a linear stays in float: by its shape, dtype and name.

The same rules serve the compiler pass, which sees graph nodes, and ``quantize_``, which sees modules. What only one
of the two can know (a weight changed inside a graph, a module with a forward of its own) is decided there.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from int8compile.config import CALIBRATED, WEIGHTS_ONLY, Int8Config
from int8compile.limits import FLOAT_DTYPES, MAX_IN_FEATURES
from int8compile.report import NOT_CALIBRATED, Reason, Site

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
    """The threshold and the outlier policy of a product that no calibration knows, which may stand at several paths."""
    if config.activation == "float" or any(weight_only_by(path, config) is not None for path in paths):
        return 0.0, WEIGHTS_ONLY
    return (0.0 if config.outlier_policy == "none" else config.llm_int8_threshold), config.outlier_policy


class Treatment(NamedTuple):
    """What ``int8compile.linear`` is told of outliers: the threshold, the policy, and the columns of "calibrated".

    ``note``: what a report says of it.
    """

    threshold: float
    outlier_policy: str
    columns: tuple[int, ...] = ()
    note: str = ""

    def noted(self, config: Int8Config) -> Treatment:
        """With the note of a linear that is not in the calibration, if there is one."""
        unknown = config.calibration is not None and self.outlier_policy != WEIGHTS_ONLY
        return self._replace(note=NOT_CALIBRATED if unknown else detail(self.outlier_policy))


def treatment(config: Int8Config, in_features: int, out_features: int, paths: Iterable[str]) -> Treatment:
    """That of a linear, which may stand at several paths.

    Raises:
        CalibrationError: the calibration has a linear of another shape at one of the paths.
    """
    paths = tuple(paths)
    found = Treatment(*outliers(config, *paths)).noted(config)
    if config.calibration is None or found.outlier_policy == WEIGHTS_ONLY:
        return found
    site = config.calibration.site(in_features, out_features, paths)
    if site is None:
        return found
    policy = CALIBRATED if site.columns else "none"
    return Treatment(0.0, policy, site.columns, calibrated_columns(len(site.columns)))


def calibrated_columns(count: int) -> str:
    """What a report says of a linear with so many."""
    return f"{count} calibrated column{'s' * (count != 1)}"


def calibration_refusal(
    config: Int8Config, in_features: int, out_features: int, paths: Iterable[str]
) -> tuple[Reason, str] | None:
    """Why the calibration leaves a linear in float, or None."""
    site = config.calibration.site(in_features, out_features, paths) if config.calibration is not None else None
    return (Reason.CALIBRATED, "") if site is not None and site.in_float else None


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
