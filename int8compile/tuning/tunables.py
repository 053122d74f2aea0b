"""What ``int8compile tune`` chooses between, in the order in which it is measured.

A tunable is a function that gives the cases for a request. To add one, write it in a file of its own and list it here.
Where the choice is made, ask ``native.tuned.choice(NAME, threads=..., **keys)`` with the keys of its cases' ``where``,
and take the default where the answer is None or no form of yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from int8compile.tuning import attention, products, prompts
from int8compile.tuning.measure import Case
from int8compile.tuning.request import Request

TUNABLES: tuple[Callable[[Request], Iterable[Case]], ...] = (attention.cases, prompts.cases, products.cases)
