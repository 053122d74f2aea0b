"""Random programs mean in int8 what they mean in float (``fuzz``), and the fuzzer finds what is planted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from fuzz.check import check
from fuzz.programs import program
from fuzz.shrink import shrunk

from int8compile.passes.analysis import Effects

PROGRAMS, PARTS = 300, 10
FAST = 4


@pytest.mark.parametrize("part", [*range(FAST), *(pytest.param(n, marks=pytest.mark.slow) for n in range(FAST, PARTS))])
def test_random_programs(part):
    """Those of seeds 0 to 299; ``make fuzz`` goes on from there."""
    linears = in_int8 = 0
    for seed in range(part, PROGRAMS, PARTS):
        made = program(seed)
        verdict = check(made)
        assert not verdict.problem, f"{verdict.problem}\n{shrunk(made)}"
        linears, in_int8 = linears + verdict.sites, in_int8 + verdict.rewritten
    assert in_int8 > 0.3 * linears > 10  # else the programs would be about nothing


@pytest.mark.parametrize("seed", [5, 29])
def test_random_programs_through_inductor(seed):
    verdict = check(dataclasses.replace(program(seed), inductor=True))
    assert not verdict.problem
    assert verdict.rewritten > 0


def test_a_planted_mistake_is_found_and_made_small(monkeypatch):
    """Passes that are told that nothing ever changes."""
    monkeypatch.setattr(Effects, "changes", lambda *_: False)
    for seed in range(300):
        made = program(seed)
        if check(made).problem:
            break
    else:
        pytest.fail("no program of 300 is wrong")
    small = shrunk(made)
    assert check(small).problem
    assert len(small.lines) < min(5, len(made.lines))


def test_a_seed_is_always_the_same_program():
    for seed in range(20):
        state = torch.random.get_rng_state()
        assert program(seed) == program(seed)
        assert torch.equal(torch.random.get_rng_state(), state)
