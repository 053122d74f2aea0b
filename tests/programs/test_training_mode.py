"""Who is in training mode: modules that compute something else there, and not whoever merely has the flag."""

import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import int8compile
from int8compile.programs.training_mode import modules_in_training


class Wrapper(nn.Module):
    """Made anew around a model, so in training mode by its flag."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def extra_repr(self):
        return f"training={self.training}"


class Drops(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Nested(nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x * 2 if self.training else x, lambda x: x, (x,))


def decorated(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args)

    return call


class Decorated(nn.Module):
    @decorated
    def forward(self, x):
        return x * 2 if self.training else x


class Inherits(Drops):
    pass


class ByName(nn.Module):
    def forward(self, x):
        return x * 2 if getattr(self, "training", False) else x


class OwnDropout(nn.Dropout):
    pass


class Sets(nn.Module):
    """Its flag is written, and of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.training = True

    def train(self, mode=True):
        return super().train(mode or self.training)

    def forward(self, x):
        return x


CARE = [
    nn.Dropout(0.1),
    nn.Dropout2d(),
    nn.AlphaDropout(),
    OwnDropout(),
    nn.BatchNorm1d(4),
    nn.SyncBatchNorm(4),
    nn.InstanceNorm1d(4, track_running_stats=True),
    nn.RReLU(),
    nn.MultiheadAttention(4, 1, dropout=0.1),
    nn.LSTM(4, 4, 2, dropout=0.1),
    Drops(),
    Nested(),
    Decorated(),
    Inherits(),
    ByName(),
]
DO_NOT = [
    nn.Linear(4, 4),
    nn.Dropout(0.0),
    OwnDropout(0.0),
    nn.BatchNorm1d(4, track_running_stats=False),
    nn.InstanceNorm1d(4),
    nn.RReLU(0.2, 0.2),
    nn.MultiheadAttention(4, 1),
    nn.LSTM(4, 4, 2),
    nn.LSTM(4, 4, 1),
    nn.GELU(),
    nn.LayerNorm(4),
    nn.TransformerEncoderLayer(4, 1, dropout=0.0),
    nn.Sequential(nn.Linear(4, 4)),
    nn.ModuleList(),
    Wrapper(nn.Linear(4, 4)),
    Sets(),
]


@pytest.mark.parametrize("module", CARE, ids=lambda module: type(module).__name__)
def test_modules_that_care(module):
    assert modules_in_training(Wrapper(module.train())) == ["inner"]
    assert modules_in_training(Wrapper(module.eval())) == []


@pytest.mark.parametrize("module", DO_NOT, ids=lambda module: type(module).__name__)
def test_modules_that_do_not_care(module):
    assert modules_in_training(Wrapper(module.train())) == []


def test_the_flag_is_of_each_module():
    model = Wrapper(nn.TransformerEncoderLayer(4, 1).eval())
    model.inner.dropout2.train()
    assert model.training
    assert modules_in_training(model) == ["inner.dropout2"]


@pytest.mark.filterwarnings("ignore")
def test_export_names_them_and_is_silent_of_a_wrapper(caplog):
    x = torch.randn(2, 32)

    def warned(model) -> str:
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="int8compile"):
            int8compile.export(model, (x,), config={"min_features": 0})
        return caplog.text

    assert "training mode" not in warned(Wrapper(nn.Sequential(nn.Linear(32, 32), nn.Dropout()).eval()))
    assert "program: inner.1 compute" in warned(Wrapper(nn.Sequential(nn.Linear(32, 32), nn.Dropout())))
    assert "the Drops itself" in warned(Drops())
    many = nn.Sequential(nn.Linear(32, 32), *(nn.Dropout() for _ in range(7)))
    assert "program: 1, 2, 3, 4, 5 and 2 more compute" in warned(many)
    assert "program: 1 compute" in warned(torch.compile(nn.Sequential(nn.Linear(32, 32), nn.Dropout())))
    assert "training mode" not in warned(torch.compile(nn.Sequential(nn.Linear(32, 32), nn.Dropout()).eval()))
