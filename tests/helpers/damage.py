"""Damaged and forged programs: ``python damage.py FILE SEED COUNT`` loads that many and prints what came of it as JSON.

In a process of its own, since a damaged file may end it, and with a bound on memory, since one may ask for all of it.
"""

import collections
import json
import random
import resource
import sys
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import int8compile
from int8compile.errors import ProgramFileError

OURS = "extra/int8compile.json"
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
KEYWORDS = {"scale": 2.0, "mode": "plain"}
Change = Callable[[str, bytes], bytes | str | None]


class Model(nn.Module):
    """A tied weight, a bias, a constant; sizes that change, a number and a text as inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(24, 8), nn.Linear(8, 8), nn.Linear(8, 24, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.ones(8), persistent=False)

    def forward(self, ids, *, scale=2.0, mode="plain"):
        hidden = self.fc(self.table(ids)) * scale + self.offset
        return {"logits": self.head(hidden), "hidden": [hidden]}


def save_program(path: Path) -> Path:
    """A small program, in a file."""
    shapes = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "scale": None, "mode": None}
    torch.manual_seed(0)
    program = int8compile.export(Model().eval(), (IDS,), KEYWORDS, shapes, {"min_features": 0})
    int8compile.save(program, path)
    return path


def rewrite_zip(path: Path, change: Change, forged: bool = False, more: Mapping[str, bytes] | None = None) -> Path:
    """A copy of an archive, each record as ``change(name, data)`` gives it; None leaves it out.

    Args:
        forged: whether what the file says of its records says so too.
        more: records to add.
    """
    root, records = records_of(path)
    changed = {name: change(name, data) for name, data in records.items()} | dict(more or {})
    records = {k: v.encode() if isinstance(v, str) else v for k, v in changed.items() if v is not None}
    return write_zip(path.with_name("changed.pt2"), root, records, forged)


def write_zip(path: Path, root: str, records: dict[str, bytes], forged: bool) -> Path:
    if forged and OURS in records:
        about = json.loads(records[OURS])
        about["records"] = {name: [len(data), zlib.crc32(data)] for name, data in records.items() if name != OURS}
        records = {**records, OURS: json.dumps(about).encode()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as out:
        for name, data in records.items():
            out.writestr(f"{root}/{name}", data)
    return path


def edit(path: Path, record: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a program with another JSON document, whose checksums are right."""

    def changed(name: str, data: bytes) -> bytes | str:
        return json.dumps(change(json.loads(data))) if name == record else data

    return rewrite_zip(path, changed, forged=True)


def records_of(path: Path) -> tuple[str, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        return infos[0].filename.split("/")[0], {i.filename.split("/", 1)[1]: archive.read(i) for i in infos}


def refused(path: Path, message: str) -> None:
    with pytest.raises(ProgramFileError, match=message):
        int8compile.load(path)


def at(value: Any, path: tuple) -> Any:
    """What is in one place of a JSON document."""
    for key in path:
        value = value[key]
    return value


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of each value in a JSON document, but its root."""
    found = [path] if path else []
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        found += places(item, (*path, key))
    return found


def replaced(document: Any, path: tuple, value: Any) -> Any:
    """A copy of a JSON document with another value in one place; ``...`` removes it."""
    document = json.loads(json.dumps(document))
    holder = document
    for key in path[:-1]:
        holder = holder[key]
    if value is ...:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return document


ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    2**31,
    2**63,
    10**30,
    0.5,
    -0.0,
    1e308,
    "",
    "x",
    "a b",
    "\0",
    "'",
    '"',
    "\u2028",
    "é",
]
ODD += ["torch.os.getpid", "Integer(3)", "Pow(Integer(10), Integer(10**9))", [], [[]], [1], {}, {"": 0}, {"as_int": 3}]
ODD += ["Infinity", "NaN", "__import__('os').abort()", "a\nb", {"as_none": True}, {"as_tensor": {"name": "ids"}}]


def change_json(random: random.Random, data: bytes) -> bytes:
    """One value of a document replaced or left out, or a key renamed."""
    document = json.loads(data)
    path = random.choice(places(document))
    kind = random.randrange(8)
    if kind == 0:
        document = replaced(document, path, ...)
    elif kind == 1 and isinstance(path[-1], str):
        value = at(document, path)
        document = replaced(replaced(document, path, ...), (*path[:-1], path[-1] + "_"), value)
    elif kind == 2:
        document = replaced(document, path, at(document, random.choice(places(document))))
    else:
        document = replaced(document, path, random.choice(ODD))
    return json.dumps(document).encode()


def damage_bytes(random: random.Random, data: bytes) -> bytes:
    """A file as a bad disk or a broken copy leaves it."""
    size = len(data)
    start = random.randrange(size)
    stop = min(size, start + random.choice([1, 2, 8, 64, 512, 4096]))
    noise = random.randbytes(stop - start)
    return random.choice(
        [
            lambda: data[:start],
            lambda: data[start:],
            lambda: data[:start] + bytes([data[start] ^ 1 << random.randrange(8)]) + data[start + 1 :],
            lambda: data[:start] + bytes(stop - start) + data[stop:],
            lambda: data[:start] + noise + data[stop:],
            lambda: data[:start] + data[stop:],
            lambda: data[:stop] + data[start:],
            lambda: data + noise,
            lambda: data[-64:] + data,
            # The last bytes are where the directory is, and each of them counts.
            lambda: data[: -(start % 400) - 1] + bytes([random.randrange(256)]) + data[size - start % 400 :],
        ]
    )()


def damage_records(random: random.Random, records: dict[str, bytes]) -> dict[str, bytes]:
    """An archive that was put together anew, with right checksums."""
    name, other = random.sample(list(records), 2)
    data = records[name]
    texts = [name for name in records if name.endswith(".json")]
    text = random.choice(texts)
    return random.choice(
        [
            lambda: {k: v for k, v in records.items() if k != name},
            lambda: {**records, name: records[other], other: data},
            lambda: {**records, name: b""},
            lambda: {**records, name: data[: len(data) // 2]},
            lambda: {**records, name: data + data},
            lambda: {**records, name: bytes(len(data))},
            lambda: {**records, name: damage_bytes(random, data) if data else b"x"},
            lambda: {k if k != name else k + "_": v for k, v in records.items()},
            lambda: {**records, name + "0": data},
            *[lambda: {**records, text: change_json(random, records[text])}] * 12,
        ]
    )()


def same(a: Any, b: Any) -> bool:
    """Whether two programs gave the same, to the bit."""
    leaves = [torch.utils._pytree.tree_leaves(outputs) for outputs in (a, b)]
    pairs = zip(*leaves, strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y) for x, y in pairs)


def main(path: Path, seed: int, count: int) -> None:
    generator = random.Random(seed)
    whole = path.read_bytes()
    root, records = records_of(path)
    expected = int8compile.load(path).module()(IDS, **KEYWORDS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
    damaged = path.with_name("damaged.pt2")
    found: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    for i in range(count):
        kind = ("bytes", "records", "forged")[i % 3]
        if kind == "bytes":
            damaged.write_bytes(damage_bytes(generator, whole))
        else:
            try:
                write_zip(damaged, root, damage_records(generator, records), kind == "forged")
            except (ValueError, TypeError):  # what it says of itself is no JSON object any more
                continue
        problem = ""
        try:
            program = int8compile.load(damaged)
        except ProgramFileError:
            found[f"{kind}: refused"] += 1
            continue
        except BaseException as error:
            problem = repr(error)[:300]
        else:
            found[f"{kind}: loaded"] += 1
            try:
                outputs = program.module()(IDS, **KEYWORDS)
                if kind != "forged" and not same(outputs, expected):
                    problem = "other numbers"
            except Exception as error:  # a forged program is another one, which may not run
                problem = repr(error)[:300] if kind != "forged" else ""
        if problem:
            kept = path.with_name(f"wrong-{seed}-{i}.pt2")
            kept.write_bytes(damaged.read_bytes())
            wrong.append(f"{kind} {kept}: {problem}")
    print(json.dumps({"found": found, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
