"""Times the forms of one computation in turns, and decides which to take.

Machines are noisy and drift, so each round times all forms one after the other, and what counts is by how much a form
is faster than the default *in the same round*: the median over the rounds, and the lower quartile, which must not be
slower. A form takes the default's place only where it is clearly faster, and where the rounds agree on it: on a machine
that computes something else meanwhile they do not.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from int8compile.native.tuned import Where

Clock = Callable[[], float]
#: computes something so many times
Run = Callable[[int], object]

#: how many times as fast as the default a form has to be
CLEARLY = 1.03
#: how far the quartiles of what the rounds say may lie apart
STEADY = 1.25
_SAMPLE_SECONDS = 2e-3
_LEAST_ROUNDS, _MOST_ROUNDS = 9, 60


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation in several forms.

    Args:
        tunable: what is chosen.
        where: what the choice is looked up by. Cases with the same are decided together.
        label: of the case, for people, such as ``"16 x 576 x 1536"``.
        default: the form that is taken without a tuned table.
        prepare: makes the operands and returns the forms by name, the default among them.
    """

    tunable: str
    where: Where
    label: str
    default: str
    prepare: Callable[[], Mapping[str, Run]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """A case with the median seconds of each form and, for all but the default, its gains in each round."""

    case: Case
    seconds: Mapping[str, float]
    gains: Mapping[str, Sequence[float]]


@dataclasses.dataclass(frozen=True)
class Decision:
    """What to take for all cases with one ``where``, and how many times as fast as the default that is (1: itself).

    ``unsteady``: the rounds of some case disagreed, so that it is the default.
    """

    tunable: str
    where: Where
    labels: tuple[str, ...]
    default: str
    choice: str
    gain: float
    seconds: Mapping[str, float]
    unsteady: bool = False

    @property
    def changes(self) -> bool:
        return self.choice != self.default


def measure(case: Case, seconds: float, clock: Clock = time.perf_counter) -> Measured:
    """Time a case's forms in turns, for as long as it takes to be sure and for about so many seconds at most."""
    end = clock() + seconds
    forms = case.prepare()
    names = list(forms)
    counts = {name: _calls(forms[name], clock) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for done in range(_MOST_ROUNDS):
        if done >= _LEAST_ROUNDS and (clock() >= end or _is_sure(_gains(times, case.default))):
            break
        for name in names if done % 2 == 0 else reversed(names):
            start = clock()
            forms[name](counts[name])
            times[name].append((clock() - start) / counts[name])
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return Measured(case, medians, _gains(times, case.default))


def _calls(run: Run, clock: Clock) -> int:
    """How many calls make up a sample. The first call, which finds nothing in any cache, does not count."""
    run(1)
    start = clock()
    run(1)
    return max(1, int(_SAMPLE_SECONDS / max(clock() - start, 1e-9)))


def _gains(times: Mapping[str, Sequence[float]], default: str) -> dict[str, list[float]]:
    base = times[default]
    return {
        name: [max(a, 1e-12) / max(b, 1e-12) for a, b in zip(base, samples, strict=True)]
        for name, samples in times.items()
        if name != default
    }


def _quartiles(gains: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(gains, n=4, method="inclusive")
    return low, middle, high


def _is_sure(gains: Mapping[str, Sequence[float]]) -> bool:
    """Whether each form is clearly faster than the default, or not faster."""
    quartiles = map(_quartiles, gains.values())
    return all(low > CLEARLY or high < 1 for low, _, high in quartiles)


def decide(measured: Sequence[Measured]) -> Decision:
    """What to take for cases with one ``where``: the form with the largest mean gain that is slower in none of them."""
    first = measured[0].case
    choice, gain = first.default, 1.0
    unsteady = any(high > STEADY * low for m in measured for low, _, high in map(_quartiles, m.gains.values()))
    for name in measured[0].gains:
        if all(name in m.gains and m.case.default == first.default for m in measured):
            quartiles = [_quartiles(m.gains[name]) for m in measured]
            mean = math.exp(statistics.fmean(math.log(middle) for _, middle, _ in quartiles))
            if mean > max(gain, CLEARLY) and all(low >= 1 for low, _, _ in quartiles) and not unsteady:
                choice, gain = name, mean
    labels, names = tuple(m.case.label for m in measured), measured[0].seconds
    seconds = {name: statistics.fmean(m.seconds[name] for m in measured if name in m.seconds) for name in names}
    return Decision(first.tunable, first.where, labels, first.default, choice, gain, seconds, unsteady)


def decide_all(measured: Iterable[Measured]) -> list[Decision]:
    """One decision for each ``where``, in the order of their first cases."""
    groups: dict[tuple[str, Where], list[Measured]] = {}
    for entry in measured:
        groups.setdefault((entry.case.tunable, entry.case.where), []).append(entry)
    return [decide(group) for group in groups.values()]
