"""The tuned table: which of several forms of a computation is the fastest here, as ``int8compile tune`` found.

    choice("fold_queries", threads=2, dtype="bfloat16", heads=9, kv_heads=3)  ->  "folded"; None: the default

A table holds what differs from the defaults, and no choice changes what is computed. It is a file beside the kernels,
one for each kind of CPU and the versions it was made with. A file that another user may have written, that has been
changed since, or that was made for another CPU or version is not used: a notice says so, once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

import int8compile
from int8compile.config import tuned_is_ignored
from int8compile.cpuinfo import cpu_key, cpu_name
from int8compile.files import replaced
from int8compile.native import builder, kernel_cache
from int8compile.native.kernel_cache import CacheError
from int8compile.native.notices import log, warn_once
from int8compile.native.trust import opened

#: what a choice is looked up by, in the order of names
Where = tuple[tuple[str, int | str], ...]

#: the tunable whose choices the CPU kernels look up by themselves
PRODUCT = "product"

_LARGEST_FILE = 1 << 20
_MOST_THREADS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice that differs from the default.

    Args:
        tunable: what is chosen, such as ``"product"``.
        threads: of torch, for which it holds.
        where: for which sizes and types it holds.
        choice, default: what is taken, and what would be.
        gain: how many times as fast that is.
    """

    tunable: str
    threads: int
    where: Where
    choice: str
    default: str
    gain: float


class Table(NamedTuple):
    """All choices, and for each number of threads the day of the latest measurement."""

    choices: tuple[Choice, ...] = ()
    days: Mapping[int, str] = {}


class Found(NamedTuple):
    """A table that may be used, which is empty where there is none, and why a file that is there is not used.

    ``others``: there is none, but there are tables of other versions for this CPU.
    """

    table: Table
    path: Path | None = None
    problem: str | None = None
    others: bool = False


class _UselessError(ValueError):
    """What a file is that holds no table for this machine."""


def where_of(**keys: int | str) -> Where:
    """Names and values in the order in which they are compared."""
    return tuple(sorted(keys.items()))


def choice(tunable: str, *, threads: int, **keys: int | str) -> str | None:
    """What to take instead of the default; None where the default is the fastest, or nothing was measured.

    A caller checks that it knows the name.
    """
    return _by_key().get((tunable, threads, where_of(**keys)))


@functools.cache
def _by_key() -> dict[tuple[str, int, Where], str]:
    return {(entry.tunable, entry.threads, entry.where): entry.choice for entry in _current().choices}


def inspect() -> Found:
    """The table that is there for this machine, or why there is none."""
    if tuned_is_ignored():
        return Found(Table(), problem="INT8COMPILE_IGNORE_TUNED is set")
    try:
        path = _path(make=False)
    except OSError:  # which whoever needs the folder for the kernels says
        return Found(Table())
    try:
        with opened(path) as file:
            content = file.read(_LARGEST_FILE + 1)
        return Found(_parse(content), path)
    except FileNotFoundError:
        return Found(Table(), others=bool(list(path.parent.glob(f"tuned-{cpu_key()}-*.json"))))
    except _UselessError as error:
        return Found(Table(), path, f"{path} {error}")
    except OSError as error:
        return Found(Table(), path, str(error))


@functools.cache
def _current() -> Table:
    """The table in use, which is read once."""
    found = inspect()
    if found.problem is not None and found.path is not None:
        ways_out = "`int8compile tune` makes a new one, `int8compile tune --clear` removes it"
        warn_once(f"int8: the tuned table is not used: {found.problem} ({ways_out})")
    if found.others:
        log.info("int8: a table was tuned by another version; `int8compile tune` makes one for this version")
    return found.table


def apply_to_kernels() -> None:
    """Give the CPU kernels, which are loaded, the choices for the instruction set in use."""
    isa = torch.ops.int8compile_native.isa()
    try:
        torch.ops.int8compile_native.set_tuned_kernels(_lines(_current().choices, isa))
    except (ValueError, RuntimeError) as error:
        warn_once(f"int8: the tuned table is not used: {str(error).splitlines()[0]}")


def _lines(choices: Iterable[Choice], isa: str) -> str:
    """As ``csrc/cpu/plan.h`` reads them."""
    lines = []
    for entry in choices:
        where = dict(entry.where)
        if entry.tunable == PRODUCT and where.get("isa") == isa:
            lines.append(f"{entry.threads} {where.get('rows')} {where.get('k')} {where.get('cols')} {entry.choice}")
    return "\n".join(lines)


def keep(choices: Iterable[Choice], measured: Iterable[tuple[str, Where]], threads: int, day: str) -> Path:
    """Put choices into this machine's table. Earlier ones for what has been measured again go; others stay.

    Raises:
        OSError: the table cannot be written; the old one is as it was.
    """
    path, again = _path(make=True), set(measured)
    with kernel_cache.locked(path.with_suffix(".lock")):
        old = Table()
        with contextlib.suppress(_UselessError, OSError), opened(path) as file:
            old = _parse(file.read(_LARGEST_FILE + 1))
        others = [e for e in old.choices if e.threads != threads or (e.tunable, e.where) not in again]
        _write(path, Table((*others, *choices), {**old.days, threads: day}))
    return path


def check_place() -> None:
    """Raise what ``keep`` would raise of the folder, for callers whose work begins long before it.

    Raises:
        CacheError: it is of no use, or cannot be written to.
    """
    folder = _path(make=True).parent
    if not kernel_cache.is_writable(folder):
        raise CacheError(f"the cache folder {folder} cannot be written to (set INT8COMPILE_CACHE_DIR to another)")


def clear() -> Path | None:
    """Remove this machine's table, whatever is in it; its path, None if there was none.

    Raises:
        OSError: it cannot be removed.
    """
    path = _path(make=False)
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    forget()
    return path


def forget() -> None:
    """Read the table anew when it is next needed."""
    _current.cache_clear()
    _by_key.cache_clear()


def _path(*, make: bool) -> Path:
    """Raises CacheError where the cache folder is of no use."""
    try:
        versions = hashlib.sha256(repr(_made_for()).encode()).hexdigest()[:16]
        return kernel_cache.user_folder(make=make) / f"tuned-{cpu_key()}-{versions}.json"
    except CacheError:
        raise
    except OSError as error:
        raise kernel_cache.unusable(error) from error


def _made_for() -> dict[str, str]:
    """What a table depends on beside the CPU; the key of the kernels is a hash of their sources, too."""
    versions = {"int8compile": int8compile.__version__, "torch": torch.__version__, "kernels": builder.key("cpu")}
    return {"cpu": cpu_name(), "cpu_key": cpu_key(), **versions}


def _write(path: Path, table: Table) -> None:
    body = {
        "made_for": _made_for(),
        "days": {str(threads): day for threads, day in sorted(table.days.items())},
        "choices": [{**dataclasses.asdict(entry), "where": dict(entry.where)} for entry in table.choices],
    }
    # Whatever the umask: who may read it is for the folder to say.
    with replaced(path, mode=0o644) as whole:
        whole.write_text(json.dumps({**body, "sha256": _digest(body)}, indent=1) + "\n")
    forget()


def _digest(body: object) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _parse(content: bytes) -> Table:
    """Raises _UselessError, which says what is wrong."""
    if len(content) > _LARGEST_FILE:
        raise _UselessError("is too large to be a table")
    try:
        body = json.loads(content)
        whole = isinstance(body, dict) and body.pop("sha256", None) == _digest(body)
    except (ValueError, RecursionError):
        whole = False
    if not whole:
        raise _UselessError("is damaged, or has been changed since it was written")
    made_for = _made_for()
    if body.get("made_for") != made_for:
        given = body.get("made_for") if isinstance(body.get("made_for"), dict) else {}
        what = next((name for name in made_for if given.get(name) != made_for[name]), "int8compile")
        names = {"cpu": "CPU", "cpu_key": "CPU", "kernels": "version of the kernels"}
        raise _UselessError(f"was made for another {names.get(what, f'version of {what}')}")
    try:
        days = {_threads(int(threads)): _text(day) for threads, day in body["days"].items()}
        return Table(tuple(_choice(entry) for entry in body["choices"]), days)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _UselessError("is no table") from error


def _choice(entry: Any) -> Choice:
    where = {_text(name): value if type(value) is int else _text(value) for name, value in entry["where"].items()}
    names = (_text(entry["choice"]), _text(entry["default"]))
    return Choice(_text(entry["tunable"]), _threads(entry["threads"]), where_of(**where), *names, float(entry["gain"]))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise TypeError(value)
    return value


def _threads(value: object) -> int:
    if type(value) is not int or not 0 < value <= _MOST_THREADS:
        raise TypeError(value)
    return value
