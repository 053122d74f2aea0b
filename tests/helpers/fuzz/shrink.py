"""The smallest program that is still wrong, by leaving out one line after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fuzz.check import check
from fuzz.programs import Program


def shrunk(program: Program) -> Program:
    """A program that is wrong, without what it is wrong without too."""
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(program):
            if check(smaller).problem:
                program, changed = smaller, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    if len(program.batches) > 1:
        yield dataclasses.replace(program, batches=program.batches[:1])
    if program.between != "pass":
        yield dataclasses.replace(program, between="pass")
    for name, others in (("returned", program.returned), ("lines", program.lines)):
        for i in range(len(others)):
            if name == "lines" or len(others) > 1:
                yield dataclasses.replace(program, **{name: [*others[:i], *others[i + 1 :]]})
