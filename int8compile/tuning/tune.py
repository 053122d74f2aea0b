"""``tune``: measure all cases within a time, and keep what is faster than the defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from int8compile.errors import OptionValueError
from int8compile.native import loader, tuned
from int8compile.native.tuned import Choice
from int8compile.tuning import products
from int8compile.tuning.measure import Case, Clock, Decision, Measured, decide_all, measure
from int8compile.tuning.request import COMMON, Request, Shape, checked_shapes, joined, of_model
from int8compile.tuning.tunables import TUNABLES

#: the part of the decisions that may be unsteady; with more, the others are not to be believed either
_MOST_UNSTEADY = 0.25
#: no case gets more of the time than that
_MOST_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What was measured and decided.

    Args:
        threads: that torch computed with.
        decisions: one for each computation, most of them for the default.
        left: the labels of cases that there was no time for.
        seconds: that it took.
        load: how many processes were computing before, on average over a minute; None where that is not known.
        path: of the table that was written; None if none was.
    """

    threads: int
    decisions: tuple[Decision, ...]
    left: tuple[str, ...]
    seconds: float
    load: float | None = None
    path: Path | None = None

    @property
    def unsteady(self) -> bool:
        """Whether too many times disagreed, as on a machine that computes something else: then nothing is kept."""
        return sum(decision.unsteady for decision in self.decisions) > _MOST_UNSTEADY * len(self.decisions)

    @property
    def changes(self) -> tuple[Decision, ...]:
        """The decisions that differ from the defaults."""
        return tuple(decision for decision in self.decisions if decision.changes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        decisions = [{**dataclasses.asdict(d), "where": dict(d.where)} for d in self.decisions]
        path = None if self.path is None else str(self.path)
        return {**dataclasses.asdict(self), "unsteady": self.unsteady, "decisions": decisions, "path": path}


def tune(
    model: Callable[..., Any] | None = None,
    *args: Any,
    shapes: Sequence[Shape] = (),
    threads: int | None = None,
    seconds: float = 120.0,
    keep: bool = True,
    options: object = None,
    progress: Callable[[str, int, int | None], None] | None = None,
    **kwargs: Any,
) -> Tuning:
    """Measure on this machine which CPU kernels and forms of attention are the fastest, and use them from now on.

    No choice changes a result of an int8 product. The defaults stay wherever nothing is at least 3 % faster. Graphs
    that are compiled already keep the forms they have.

    Args:
        model: measure for the shapes in its graphs, as ``model(*args, **kwargs)`` runs them. With neither a model nor
            shapes: for shapes that many models have.
        shapes: of more weights, as (K, N) = (in_features, out_features).
        threads: of torch to measure with, and for which the choices hold; by default those it has now.
        seconds: to take at most, roughly.
        keep: write the choices into the table beside the kernels, where other processes find them. They are not kept
            where the times are so unsteady that they tell nothing.
        options: those of ``Int8Config``, for the model.
        progress: called with the name of a step, how many of its parts are done, and of how many.

    Raises:
        OptionValueError: threads or seconds that are not above 0; a shape that no weight has.
        KernelBuildError: there are no native kernels.
        CaptureError: the model is not callable.
        OSError: the table cannot be written; before anything is measured, if that can be told then.
    """
    if threads is not None and threads < 1:
        raise OptionValueError("threads", threads, "a number above 0")
    if not seconds > 0:
        raise OptionValueError("seconds", seconds, "a number above 0")
    tell = progress or (lambda step, done, total: None)
    if keep:
        tuned.check_place()
    loader.load("cpu")
    asked = [Request(checked_shapes(shapes), (), ())] if shapes else []
    if model is not None:
        tell("look at the model", 0, None)
        asked.append(of_model(model, args, kwargs, options))
        tell("look at the model", 1, 1)
    with _undisturbed(threads or torch.get_num_threads()):
        tuning = run(_cases(joined(asked) if asked else COMMON), seconds, tell)
    if not keep or tuning.unsteady:
        return tuning
    return dataclasses.replace(tuning, path=_keep(tuning))


def _cases(request: Request) -> list[Case]:
    request = request if request.dtypes else dataclasses.replace(request, dtypes=COMMON.dtypes)
    return [case for tunable in TUNABLES for case in tunable(request)]


def run(
    cases: Sequence[Case],
    seconds: float,
    progress: Callable[[str, int, int | None], None],
    clock: Clock = time.perf_counter,
) -> Tuning:
    """Measure the cases with the threads that torch has now, each for its part of the time that is left."""
    start, load = clock(), os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    measured: list[Measured] = []
    for done, case in enumerate(cases):
        progress("measure", done, len(cases))
        left = start + seconds - clock()
        if left <= 0:
            break
        measured.append(measure(case, min(_MOST_SECONDS, left / (len(cases) - done)), clock))
    progress("measure", len(measured), len(cases))
    decisions = tuple(decide_all(measured))
    labels = tuple(case.label for case in cases[len(measured) :])
    return Tuning(torch.get_num_threads(), decisions, labels, clock() - start, load)


@contextlib.contextmanager
def _undisturbed(threads: int) -> Iterator[None]:
    """Within the context: so many threads, no gradients, and the kernels' own choices; afterwards all as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.ops.int8compile_native.set_tuned_kernels("")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(before)
        tuned.apply_to_kernels()
        products.release()


def _keep(tuning: Tuning) -> Path:
    choices = [
        Choice(d.tunable, tuning.threads, d.where, d.choice, d.default, round(d.gain, 3)) for d in tuning.changes
    ]
    day = datetime.date.today().isoformat()
    sure = [(d.tunable, d.where) for d in tuning.decisions if not d.unsteady]
    path = tuned.keep(choices, sure, tuning.threads, day)
    tuned.apply_to_kernels()
    return path
