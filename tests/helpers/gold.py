"""LLM.int8() in float64 and plain numpy: the yardstick, written from the paper and sharing no code with the package."""

from __future__ import annotations

import math

import numpy as np
import torch


def weight_codes(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, K] and scale [N] of a float weight [N, K]: absmax of each output channel."""
    values = weight.detach().double().numpy()
    absmax = np.abs(values).max(axis=1, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(absmax[:, None] > 0, np.rint(values * (127.0 / absmax)[:, None]), 0.0)
    return codes, absmax / 127.0


def row_codes(x: torch.Tensor, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [M, K], scale [M] and outlier columns [K] of an activation [M, K]."""
    values = x.detach().double().numpy()
    outlier = np.abs(values) >= threshold if threshold > 0 else np.zeros(values.shape, bool)
    inliers = np.where(outlier, 0.0, values)
    absmax = np.abs(inliers).max(axis=1, initial=0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(absmax[:, None] > 0, np.rint(inliers * (127.0 / absmax)[:, None]), 0.0)
    return codes, absmax / 127.0, outlier.any(axis=0)


def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    policy: str = "column",
) -> np.ndarray:
    """LLM.int8() of x [..., K] with an int8 weight [N, K]: int8 product without the outliers, plus theirs in float64.

    Outlier columns (policy "column") or elements ("element") are multiplied as they are with the dequantised weight;
    everything else goes through its int8 code.
    """
    rows = math.prod(x.shape[:-1])
    flat = x.detach().double().numpy().reshape(rows, x.shape[-1])
    q, row_scale, columns = row_codes(x.detach().reshape(rows, x.shape[-1]), threshold)
    exact = np.broadcast_to(columns, flat.shape) if policy == "column" else np.abs(flat) >= max(threshold, 1e-300)
    exact = exact & columns
    effective = np.where(exact, flat, q * row_scale[:, None])
    dequantized = codes.double().numpy() * scale.double().numpy()[:, None]
    out = effective @ dequantized.T
    if bias is not None:
        out = out + bias.detach().double().numpy()
    return out.reshape(*x.shape[:-1], codes.shape[0])


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Relative Frobenius error."""
    difference = actual.detach().double().numpy() - expected
    return float(np.linalg.norm(difference) / max(np.linalg.norm(expected), 1e-300))
