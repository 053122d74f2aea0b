"""Thresholds at the ends of what a float32 holds: refused with the same words, or computed the same, by everyone.

A threshold that is 0 as a float32, or that a CPU in flush-to-zero mode takes for 0, is reached by every value, the
padding of a kernel's last vector included. So there are none: the configuration and each operator refuse them.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch

from int8compile import Int8Config
from int8compile.errors import OptionValueError
from int8compile.limits import SMALLEST_THRESHOLD
from int8compile.native import providers
from int8compile.ops import linear, master_linear, quantize_rowwise, quantize_weight, scaled_mm
from int8compile.ops._library import REFERENCES

REFUSED = [1e-46, 1e-45, 1e-40, math.nextafter(SMALLEST_THRESHOLD, 0), 5e-324, -1.0, -1e-46, -math.inf, math.nan]
ACCEPTED = [0.0, -0.0, SMALLEST_THRESHOLD, 1e-30, 2.5, torch.finfo(torch.float32).max, 1e39, 1.7e308, math.inf]


@pytest.mark.parametrize("threshold", [*REFUSED, Fraction(1, 10**400), -(10**400)])
def test_the_configuration_refuses_them(threshold):
    with pytest.raises(
        OptionValueError, match=r"llm_int8_threshold=.*: expected a real number >= 0: either 0, .* 2\*\*-126"
    ):
        Int8Config(llm_int8_threshold=threshold)


@pytest.mark.parametrize("threshold", [*ACCEPTED, 10**400])
def test_the_configuration_takes_any_other(threshold):
    taken = Int8Config(llm_int8_threshold=threshold).llm_int8_threshold
    assert taken == (math.inf if threshold == 10**400 else threshold)
    assert math.copysign(1, taken) == 1


def call(name: str, value: float) -> Callable[[Callable[..., Any]], Any]:
    """An operator with this threshold (``residual_from`` of ``scaled_mm``), on an activation with every extreme."""
    x = torch.randn(4, 19)
    x[0, :6] = torch.tensor([0.0, -0.0, 1e-45, 1e-38, SMALLEST_THRESHOLD, 3e38])
    x[1, 7], x[2, 8] = math.inf, math.nan
    weight = torch.randn(5, 19)
    codes, scale = quantize_weight(weight)
    flags = torch.arange(19) % 3 == 0
    zeros = torch.zeros(4, 19, dtype=torch.int8), torch.zeros(4)
    return {
        "linear": lambda run: run(x, codes, scale, None, value, "column"),
        "linear by element": lambda run: run(x, codes, scale, None, value, "element"),
        "quantize_rowwise": lambda run: run(x, value),
        "scaled_mm": lambda run: run(*zeros, x, flags, codes, scale, None, torch.float32, value),
        "master_linear": lambda run: run(x, weight, None, value, "column"),
    }[name]


OPERATORS = {
    "linear": linear,
    "linear by element": linear,
    "quantize_rowwise": quantize_rowwise,
    "scaled_mm": scaled_mm,
    "master_linear": master_linear,
}


@pytest.mark.parametrize("value", REFUSED)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_them_in_the_same_words(name, value):
    said = set()
    for run in (OPERATORS[name], REFERENCES[OPERATORS[name]]):
        with pytest.raises(ValueError, match=rf"int8compile::{name.split()[0]}: ") as error:
            call(name, value)(run)
        said.add(str(error.value).split("\n")[0])
    argument, meaning = ("residual_from", "whole columns") if name == "scaled_mm" else ("threshold", "no outliers")
    assert said == {
        f"int8compile::{name.split()[0]}: {argument}={value:g}; expected 0 ({meaning}) or at least 2**-126 (1.2e-38)"
    }


@pytest.mark.parametrize("value", ACCEPTED)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_on_any_other(name, value):
    if providers.choose_provider("auto", [torch.ones(1)]).native is False:
        pytest.skip("no native kernels here")
    torch.manual_seed(0)
    problem = call(name, value)
    got, want = (problem(run) for run in (OPERATORS[name], REFERENCES[OPERATORS[name]]))
    if name == "quantize_rowwise":
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_an_infinite_threshold_means_infinities_alone():
    x = torch.tensor([[1.0, math.inf, 3e38], [math.nan, 2.0, 1.0]])
    for run in (quantize_rowwise, REFERENCES[quantize_rowwise]):
        for threshold in (math.inf, 1e39):
            assert run(x, threshold)[2].tolist() == [False, True, False]
