"""Which form is taken, by made-up times: the clock is the forms' own."""

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from int8compile.native.tuned import where_of
from int8compile.tuning.measure import CLEARLY, Case, Decision, Measured, decide, decide_all, measure


class World:
    """Time passes only where a form runs: each call takes as long as the form's next entry says."""

    def __init__(self, **seconds):
        self.now = 0.0
        self.seconds = {
            name: itertools.cycle(entry if isinstance(entry, list) else [entry]) for name, entry in seconds.items()
        }
        self.calls = dict.fromkeys(seconds, 0)
        self.order = []

    def clock(self):
        return self.now

    def run(self, name):
        def calls(count):
            self.order.append(name)
            self.calls[name] += count
            self.now += count * next(self.seconds[name])

        return calls

    def case(self, default="a", **where):
        return Case(
            "thing", where_of(**where), f"case {where}", default, lambda: {n: self.run(n) for n in self.seconds}
        )


def measured(default="a", where=None, label="", **gains):
    case = Case("thing", where_of(**(where or {"size": 1})), label, default, dict)
    names = [default, *gains]
    return Measured(case, dict.fromkeys(names, 1.0), gains)


def test_a_faster_form_is_taken_and_a_slower_one_is_not():
    for other, choice, gain in ((0.5e-3, "b", 2.0), (2e-3, "a", 1.0), (1e-3, "a", 1.0)):
        world = World(a=1e-3, b=other)
        decision = decide([measure(world.case(), 10.0, world.clock)])
        assert (decision.choice, decision.changes) == (choice, choice == "b")
        assert decision.gain == pytest.approx(gain)
        assert decision.seconds == pytest.approx({"a": 1e-3, "b": other})


def test_forms_take_turns_and_begin_in_turns():
    world = World(a=1.0, b=1.0)
    measure(world.case(), 0.0, world.clock)
    rounds = world.order[4:]  # each has run twice before, not to count
    assert rounds[:4] == ["a", "b", "b", "a"]
    assert rounds.count("a") == rounds.count("b")


def test_short_calls_are_timed_many_at_once():
    world = World(a=1e-6, b=1e-6)
    measure(world.case(), 0.0, world.clock)
    assert world.calls["a"] > 1000


def test_a_form_has_to_be_clearly_faster():
    assert decide([measured(b=[CLEARLY - 0.01] * 9)]).choice == "a"
    assert decide([measured(b=[CLEARLY + 0.01] * 9)]).choice == "b"


def test_a_form_that_is_often_slower_is_not_taken_whatever_its_median():
    assert decide([measured(b=[0.9, 0.9, 0.9, 1.5, 1.5, 1.5, 1.5, 1.5])]).choice == "a"


def test_where_the_rounds_disagree_the_default_stays():
    decision = decide([measured(b=[1.0, 1.1, 1.5, 1.6, 3.0, 3.1, 3.2, 3.3])])
    assert (decision.choice, decision.gain, decision.unsteady) == ("a", 1.0, True)
    assert not decide([measured(b=[1.3, 1.31, 1.35, 1.4, 9.0])]).unsteady


def test_the_best_of_several_is_taken():
    decision = decide([measured(b=[1.2] * 9, c=[1.4] * 9, d=[0.5] * 9)])
    assert (decision.choice, decision.gain) == ("c", pytest.approx(1.4))


def test_cases_that_are_looked_up_alike_are_decided_together():
    both = [measured(label="x", b=[1.2] * 9), measured(label="y", b=[1.1] * 9)]
    decision = decide(both)
    assert (decision.choice, decision.labels) == ("b", ("x", "y"))
    assert decision.gain == pytest.approx((1.2 * 1.1) ** 0.5)
    # (a) one of them is slower with it; (b) one of them cannot be computed by it; (c) another default
    for other in (measured(b=[0.97] * 9), measured(c=[1.2] * 9), measured(default="b", a=[1.2] * 9)):
        assert decide([both[0], other]).choice == "a"


def test_every_place_gets_a_decision_of_its_own():
    entries = [
        measured(where={"size": size}, label=str(size), b=[gain] * 9) for size, gain in ((1, 1.2), (2, 0.8), (1, 1.3))
    ]
    decisions = decide_all(entries)
    assert [(dict(d.where)["size"], d.choice, d.labels) for d in decisions] == [(1, "b", ("1", "1")), (2, "a", ("2",))]


def test_time_is_spent_where_it_is_doubtful():
    def rounds(*seconds):
        world = World(a=1.0, b=list(seconds))
        measure(world.case(), 1e9, world.clock)
        return world.order.count("b") - 2

    assert rounds(0.5) == rounds(2.0) < rounds(0.9, 1.1, 0.9, 1.2) < 100


@given(
    st.floats(0, 1),
    st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=7),
    st.lists(st.floats(1e-7, 1.0), min_size=1, max_size=7),
)
def test_whatever_the_times_a_measurement_ends_and_its_decision_is_one_of_the_forms(seconds, a, b):
    world = World(a=a, b=b)
    found = measure(world.case(), seconds, world.clock)
    decision = decide([found])
    assert isinstance(decision, Decision)
    assert decision.choice in ("a", "b")
    if decision.changes:
        assert statistics.median(found.gains["b"]) >= CLEARLY - 1e-9


def test_a_clock_that_stands_still_decides_nothing():
    world = World(a=0.0, b=0.0)
    assert not decide([measure(world.case(), 1.0, world.clock)]).changes
