"""Which columns have 16-bit codes: the mathematics of ``calibrate``.

The step of a row is set by the largest magnitude outside of the columns, s[m] = max_{k not in columns} |x[m, k]| / 127,
and each of its K values is off by up to half of it, evenly. So the output of a linear is off by

    E |error[m]|^2  =  s[m]^2 / 12 * |W|^2        (Frobenius norm)

which is taken relative to the median of |output[m]|^2. (Of the mean, a few rows of huge values would make next to
nothing of a linear's error; relative to its own row's, next to nothing of theirs.) Columns are worth having together: a
row with ten large values has a smaller step only without all ten. So they are taken away rather than added, one after
the other the one that is missed least, from those that any row would miss; what is left at each count is that group's
best. A budget is then spent by marginal worth, over the convex hull of each group's errors.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: no linear has more of its columns in 16 bits, where sums would take a sixth more time
MOST = 0.16
#: taken away at a time, of those that are left
PART = 64


class Choices(NamedTuple):
    """Columns of one group in the order in which they are worth having, and the error with the first 0, 1, ... of them.

    The error of index ``j`` is infinite where no set of that size was looked at.
    """

    columns: list[int]
    errors: list[float]


def choices(magnitudes: torch.Tensor, columns: torch.Tensor, in_features: int, scale: float) -> Choices:
    """What columns of a group are worth.

    Args:
        magnitudes, columns: the largest of each row [R, L], in descending order, and where they are.
        scale: what the mean square of steps is multiplied by to give the error.
    """
    candidates, places = torch.unique(columns, return_inverse=True)
    values = torch.zeros(len(magnitudes), len(candidates)).scatter_(1, places, magnitudes)
    # What is not among a row's largest is taken to be as large as the last of these, unless that is all there is.
    floor = magnitudes[:, -1] if magnitudes.shape[1] < in_features else torch.zeros(len(magnitudes))
    most = min(len(candidates), max(1, int(MOST * in_features)))
    above = (values.square() - floor.square().unsqueeze(1)).clamp(min=0).sum(0)
    kept = above.topk(most).indices
    others = torch.ones(len(candidates), dtype=torch.bool).index_fill(0, kept, False)
    step = floor if not bool(others.any()) else torch.maximum(floor, values[:, others].amax(1))
    values, candidates = values[:, kept], candidates[kept]
    order: list[int] = []
    errors = {most: float(step.square().mean())}
    left = torch.arange(most)
    while len(left):
        missed = (values[:, left].square() - step.square().unsqueeze(1)).clamp(min=0).sum(0)
        gone = missed.argsort(stable=True)[: max(1, len(left) // PART)]
        order += candidates[left[gone]].tolist()
        step = torch.maximum(step, values[:, left[gone]].amax(1))
        left = left[torch.ones(len(left), dtype=torch.bool).index_fill(0, gone, False)]
        errors[len(left)] = float(step.square().mean())
    return Choices(order[::-1], [scale * errors.get(count, float("inf")) for count in range(most + 1)])


def spend(groups: Sequence[Choices], prices: Sequence[int], budget: int) -> list[int]:
    """How many columns each group gets.

    Args:
        prices: what a column of each group costs: one for each linear that has it.
        budget: what all may cost.
    """
    counts = [0] * len(groups)
    heap: list[tuple[float, int, int]] = []

    def offer(at: int) -> None:
        errors, now = groups[at].errors, counts[at]
        worth = [((errors[now] - errors[j]) / ((j - now) * prices[at]), -j) for j in range(now + 1, len(errors))]
        if worth and max(worth)[0] > 0:
            gain, negated = max(worth)
            heapq.heappush(heap, (-gain, at, -negated))

    for at in range(len(groups)):
        offer(at)
    while heap:
        _, at, count = heapq.heappop(heap)
        cost = (count - counts[at]) * prices[at]
        if cost <= budget:
            budget -= cost
            counts[at] = count
            offer(at)
        else:  # what of it can be had still
            affordable = [
                j for j in range(counts[at] + 1, min(count, counts[at] + budget // prices[at] + 1))
                if groups[at].errors[j] < groups[at].errors[counts[at]]
            ]  # fmt: skip
            if affordable:
                best = min(affordable, key=lambda j: groups[at].errors[j])
                budget -= (best - counts[at]) * prices[at]
                counts[at] = best
    return counts


def worst(errors: Sequence[float], sizes: Sequence[int], budget: float) -> list[int]:
    """Which linears stay in float: those with the most error for an element of their weight, of `budget` in all.

    Args:
        errors: of each linear in int8, relative to its output.
        sizes: elements of its weight.
        budget: elements that may stay in float.
    """
    chosen: list[int] = []
    for at in sorted(range(len(errors)), key=lambda i: -errors[i] / sizes[i]):
        if sizes[at] <= budget and errors[at] > 0:
            budget -= sizes[at]
            chosen.append(at)
    return chosen
