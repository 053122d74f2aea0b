"""``calibrate``: runs a float model on batches once, and chooses the columns that have 16-bit codes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from int8compile.calibrating.choosing import choices, spend, worst
from int8compile.calibrating.observing import Group, Observer
from int8compile.calibrating.running import evaluating, linears_of, run, several, tracked, weight_rows
from int8compile.calibration import CalibratedSite, Calibration
from int8compile.config import Int8Config
from int8compile.errors import CalibrationError
from int8compile.modules.inplace import Found
from int8compile.ops import quantize_weight


def calibrate(
    model: object,
    batches: Iterable[Any],
    budget: float = 0.02,
    max_float_weights: float = 0.0,
    progress: bool = True,
    *,
    config: object = None,
) -> Calibration:
    """Choose the columns of a model's linears whose codes have 16 bits, by what the model computes on some batches.

    One pass without gradients, in evaluation mode; the model is left as it was. What is kept does not grow with the
    batches. A few thousand rows (tokens) of text like that which the model is meant for are enough.

    Args:
        model: a float model, compiled or not.
        batches: what the model is called with, each a tensor, or its arguments as a tuple or a dict.
        budget: the share of all columns of all linears that may have 16-bit codes. It is spent where it lowers the
            error of the linears' outputs most, so that some have many and some none. Each per cent takes about as much
            of the time of products.
        max_float_weights: the share of the linears' weights that may stay in float: whole linears, those whose outputs
            int8 changes most for their size.
        progress: whether to show a bar on stderr, if that is a terminal.
        config: options, as for ``torch.compile(..., backend="int8", options=...)``: which linears are to be int8.

    Returns:
        a ``Calibration``, for ``options={"calibration": ...}``; ``calibration.save(path)`` writes it. Linears that no
        batch reached are not in it, and keep the outlier policy of the options.

    Raises:
        CalibrationError: there is no batch, no linear to calibrate, or none that a batch reached; a batch is not what
            it should be; NaN or infinite activations.
        OptionValueError, OptionNameError: bad options.
    """
    call = "calibrate(model, batches)"
    for name, share in (("budget", budget), ("max_float_weights", max_float_weights)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise CalibrationError(f"calibrate(..., {name}={share!r}): expected a share, from 0 to 1")
    options = Int8Config.make(config)
    module, linears = linears_of(model, options, call)
    observer = Observer(linears, call)
    count = 0
    with evaluating(module), observer.watching():
        for batch in tracked(several(batches, call), "calibrate", progress):
            observer.batch = count
            run(module, batch, call)
            count += 1
    if not observer.groups:
        what = "batches is empty" if count == 0 else f"none of {len(linears)} linears was called by {count} batches"
        raise CalibrationError(f"{call}: {what}; expected batches that the model computes something of")
    sites = _chosen(observer, budget, max_float_weights)
    about = {
        "model": type(module).__name__,
        "budget": budget,
        "max_float_weights": max_float_weights,
        "batches": count,
        "rows": max(group.seen for group in observer.groups),
        "unreached": [linear.site.path for linear in linears if not observer.reached(linear)],
    }
    return Calibration(sites, about)


def _chosen(observer: Observer, budget: float, max_float_weights: float) -> dict[str, CalibratedSite]:
    groups, float_errors, scales = observer.groups, {}, {}
    place = {id(linear): at for at, linear in enumerate(observer.linears)}
    for group in groups:
        for linear in group.sites:
            output = _median(observer.outputs[place[id(linear)]].all()[0])
            square, rounding = _weight_squares(group, linear)
            scales[id(linear)] = square / output / (12 * 127**2)
            float_errors[id(linear)] = rounding / output
    all_in_int8 = _columns(groups, scales, budget, frozenset())
    flat = [(group, linear) for group in groups for linear in group.sites]
    sizes = [linear.site.in_features * linear.site.out_features for _, linear in flat]
    errors = [all_in_int8[id(linear)][1] + float_errors[id(linear)] for _, linear in flat]
    in_float = frozenset(id(flat[i][1]) for i in worst(errors, sizes, max_float_weights * sum(sizes)))
    columns = _columns(groups, scales, budget, in_float) if in_float else all_in_int8
    made = {}
    for _, linear in flat:
        site = linear.site
        chosen, error = columns.get(id(linear), ((), 0.0))
        made[site.path] = CalibratedSite(site.in_features, site.out_features, chosen, id(linear) in in_float, error)
    return made


def _columns(
    groups: list[Group], scales: dict[int, float], budget: float, in_float: frozenset[int]
) -> dict[int, tuple[tuple[int, ...], float]]:
    """Columns and error of each linear that is int8, by id."""
    left = [(group, [linear for linear in group.sites if id(linear) not in in_float]) for group in groups]
    left = [(group, sites) for group, sites in left if sites]
    offers, prices = [], []
    for group, sites in left:
        magnitudes, columns = group.sample.all()
        scale = sum(scales[id(linear)] for linear in sites)
        offers.append(choices(magnitudes, columns.long(), sites[0].site.in_features, scale))
        prices.append(len(sites))
    total = sum(linear.site.in_features for _, sites in left for linear in sites)
    result = {}
    for (_, sites), offer, count in zip(left, offers, spend(offers, prices, int(budget * total)), strict=True):
        whole = sum(scales[id(linear)] for linear in sites)
        for linear in sites:
            error = offer.errors[count] * scales[id(linear)] / whole if whole else 0.0
            result[id(linear)] = tuple(sorted(offer.columns[:count])), error
    return result


def _median(squares: torch.Tensor) -> float:
    """Of what a linear gives; of one that gives nothing but zeros, infinity, so that nothing is spent on it."""
    value = float(squares.double().median())
    return value if value > 0 else float(squares.double().mean()) or math.inf


def _weight_squares(group: Group, linear: Found) -> tuple[float, float]:
    """|W|^2, and what rounding W to int8 changes an output by: sum_k E[x_k^2] |W_k - int8(W)_k|^2."""
    inputs = (group.squares / max(1, group.seen)).float()
    square = rounding = 0.0
    for rows in weight_rows(linear):
        codes, weight_scale = quantize_weight(rows)
        off = rows - codes.float() * weight_scale.unsqueeze(1)
        square += float(rows.double().square().sum())
        rounding += float((off.square() @ inputs.to(off.device)).double().sum())
    return square, rounding
