"""Go on making and checking programs for some time, or up to a number of them.

python -m fuzz --seconds 600
python -m fuzz --programs 5000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import sys
import time

from fuzz.check import check, quiet
from fuzz.programs import program
from fuzz.shrink import shrunk


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--programs", type=int, default=None, help="stop after so many programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program; the next one has the next")
    parser.add_argument("--inductor-every", type=int, default=50, help="let inductor compile one in so many; 0: none")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first wrong program")
    given = parser.parse_args()
    quiet()
    end, wrong, counts = time.monotonic() + given.seconds, 0, collections.Counter[str]()
    numbers = itertools.count() if given.programs is None else range(given.programs)
    for number in numbers:
        if time.monotonic() > end:
            break
        made = program(given.seed + number)
        if given.inductor_every and number % given.inductor_every == given.inductor_every - 1:
            made = dataclasses.replace(made, inductor=True)
        verdict = check(made)
        counts.update(programs=1, linears=verdict.sites, int8=verdict.rewritten, compared=verdict.compared)
        if verdict.problem:
            wrong += 1
            smallest = shrunk(made)
            print(f"\n{verdict.problem}\n{smallest}{check(smallest).problem}", flush=True)
            if not given.keep_going:
                break
        if number % 100 == 99:
            print(f"{dict(counts)}, {wrong} wrong", file=sys.stderr, flush=True)
    print(f"from seed {given.seed}: {dict(counts)}, {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
