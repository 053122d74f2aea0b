"""Experts that a module keeps as bare Parameters [E, N, K], which ``quantize_`` leaves in float, for the report."""

from __future__ import annotations

from torch import nn

from int8compile import selection
from int8compile.config import Int8Config
from int8compile.limits import FLOAT_DTYPES
from int8compile.report import Reason, Site, WeightUse

_LEFT = "in modules; backend='int8' takes them"


def bare_experts(model: nn.Module, config: Int8Config) -> tuple[list[Site], list[WeightUse]]:
    """A site, and the bytes, of each such Parameter of a model."""
    sites, uses = [], []
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn."):  # a convolution's weight
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() != 3 or weight.shape[0] < 2 or weight.dtype not in FLOAT_DTYPES:
                continue
            whole = f"{path}.{name}" if path else name
            n, k = weight.shape[1:] if not getattr(module, "is_transposed", False) else weight.shape[:0:-1]
            reason, detail = selection.name_refusal(whole, False, config) or (Reason.EXPERTS, _LEFT)
            dtype = str(weight.dtype).removeprefix("torch.")
            sites.append(Site(whole, int(k), int(n), dtype, reason, detail, int(weight.shape[0])))
            uses.append(WeightUse(id(weight), weight.numel() * weight.element_size(), 0, True))
    return sites, uses
