"""LLM.int8() in eager PyTorch, by the book: what the perplexity of ``backend="int8"`` is held against.

Written from the paper's equation 8 with outlier columns taken out of the int8 product, not in the one-pass form that
the package uses, and sharing no code with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class EmulatedLinear(nn.Module):
    """A linear as LLM.int8() computes it; slow, since products run in float64 so as to be exact.

    Args:
        linear: gives weight and bias; left as it is.
        threshold: features that reach this magnitude in any row are multiplied in float.
    """

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        self.codes = torch.nan_to_num(weight / self.scale).round().to(torch.int8)
        self.bias = linear.bias
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        is_outlier = rows.abs() >= self.threshold
        columns = is_outlier.any(dim=0)
        inliers = rows.masked_fill(is_outlier, 0)
        row_scale = inliers.abs().amax(dim=1, keepdim=True) / 127
        codes = torch.nan_to_num(inliers / row_scale).round().masked_fill(columns, 0)
        product = (codes.double() @ self.codes.double().t()).float() * row_scale * self.scale.t()
        # The outlier columns in the model's own precision, by the weight that int8 stands for.
        outlier_weight = (self.codes[:, columns].float() * self.scale).to(x.dtype)
        product += functional.linear(rows[:, columns].to(x.dtype), outlier_weight).float()
        if self.bias is not None:
            product += self.bias.float()
        return product.to(x.dtype).reshape(*x.shape[:-1], -1)


def emulate_(model: nn.Module, threshold: float = 6.0, min_features: int = 0) -> int:
    """Replace a model's linears by ``EmulatedLinear``, but for its output embedding; return how many.

    Args:
        min_features: linears with fewer input or output features stay as they are.
    """
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head and min(child.weight.shape) >= min_features:
                setattr(parent, name, EmulatedLinear(child, threshold))
                count += 1
    return count
