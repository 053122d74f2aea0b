"""Modules of a few linears, each with one thing that a model may do around them."""

from __future__ import annotations

import torch
from torch import nn


class Mlp(nn.Module):
    """Two linears of the common kind."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        return src + self.down(self.act(self.up(self.norm(src))))

    def act(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.gelu(x)


class BrokenMlp(Mlp):
    """The same with a graph break between its linears."""

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        x = self.up(self.norm(src))
        torch._dynamo.graph_break()
        return src + self.down(self.act(x))


class PartlyAutocast(Mlp):
    """The same with autocast for one of its linears only."""

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        x = self.norm(src)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.up(x)
        return src + self.down(self.act(x.float()))


class Refusals(Mlp):
    """The same with linears behind it that are to stay in float: a named one, one computed, one in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.factor, self.wide = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32).double()

    def forward(self, src: torch.Tensor) -> torch.Tensor:
        x = self.head(super().forward(src))
        x = nn.functional.linear(x, self.factor.weight.abs(), self.factor.bias)
        return self.wide(x.double()).float()
