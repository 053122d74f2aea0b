"""``load`` on files that are damaged or made to deceive: refused by name, or the very program; nothing in them runs."""

import json
import os
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from checkout import HELPERS, ROOT
from damage import (
    IDS,
    MODEL,
    OURS,
    WEIGHTS,
    edit,
    records_of,
    refused,
    replaced,
    rewrite_zip,
    save_program,
    write_zip,
)
from torch import nn

import int8compile
from int8compile.errors import ProgramFileError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_program(tmp_path_factory.mktemp("programs") / "model.pt2")


# Random damages, in a process of their own


def fuzz(saved: Path, folder: Path, seed: int, count: int) -> dict:
    path = folder / "model.pt2"
    path.write_bytes(saved.read_bytes())
    command = [sys.executable, str(HELPERS / "damage.py"), str(path), str(seed), str(count)]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["wrong"] == []
    return told["found"]


def test_damaged_files_are_refused_or_the_very_program(saved, tmp_path):
    """Cut off, flipped, overwritten, put together anew, with another JSON; forged ones have right checksums."""
    found = fuzz(saved, tmp_path, 0, 450)
    assert all(found[f"{kind}: refused"] > 50 for kind in ("bytes", "records", "forged")), found
    assert found["forged: loaded"] > 5, found  # so that what torch makes of them is tried too


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_thousands_of_damaged_files(saved, tmp_path, seed):
    fuzz(saved, tmp_path, seed, 2000)


def test_each_byte_of_the_directory_counts(saved, tmp_path):
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        start = archive.start_dir
    path = tmp_path / "flipped.pt2"
    expected = int8compile.load(saved).module()(IDS, scale=2.0, mode="plain")["logits"]
    for at in range(start, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            program = int8compile.load(path)
        except ProgramFileError:
            continue
        assert torch.equal(program.module()(IDS, scale=2.0, mode="plain")["logits"], expected), at


# Zip files that two readers read in two ways


def test_compressed_records_are_refused(saved, tmp_path):
    root, records = records_of(saved)
    path = tmp_path / "small.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in {**records, "data/weights/weight_0": bytes(1 << 26)}.items():
            out.writestr(f"{root}/{name}", data)
    assert path.stat().st_size < 1 << 18
    refused(path, "it is compressed, which neither PyTorch nor int8compile does")


def test_every_byte_of_a_file_has_one_meaning(saved, tmp_path):
    """(1) bytes before (2) after (3) between records (4) a comment (5) a record twice (6) another name in its header
    (7) another size there (8) records within records (9) folders up (10) another root (11) two ends that differ."""
    path = rewrite_zip(saved, lambda name, data: data)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        infos, directory = archive.infolist(), archive.start_dir
    second = infos[1]
    body, central, end = whole[:directory], whole[directory:-22], whole[-22:]
    header = struct.Struct("<4s5H3I2H")

    def at_end(**changes) -> bytes:
        fields = dict(
            zip(("mark", "a", "b", "n", "m", "size", "start", "note"), struct.unpack("<4s4H2IH", end), strict=True)
        )
        return struct.pack("<4s4H2IH", *{**fields, **changes}.values())

    def with_header(change) -> bytes:
        fields = change(list(header.unpack_from(body, second.header_offset)))
        return body[: second.header_offset] + header.pack(*fields) + body[second.header_offset + header.size :]

    def other_size(fields):
        fields[7] = fields[8] = second.file_size - 1
        return fields

    name_at = second.header_offset + header.size
    renamed = body[:name_at] + b"M" + body[name_at + 1 :]
    overlapping = central.replace(
        struct.pack("<I", second.header_offset) + second.filename.encode(), bytes(4) + second.filename.encode()
    )
    locator = struct.pack(
        "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(infos), len(infos), len(central), directory - 1
    )
    locator += struct.pack("<4sIQI", b"PK\6\7", 0, directory + len(central), 1)
    cases = {
        "before": (b"junk" + whole, "directory is not where it belongs"),
        "after": (whole + b"junk", "truncated, or not a file of int8compile.save"),
        "between": (body + b"junk" + central + at_end(start=directory + 4), "is not as long as the directory says"),
        "comment": (whole[:-2] + b"\4\0junk", "truncated, or not a file of int8compile.save"),
        "header's name": (renamed + central + end, "is called something else where it is"),
        "header's size": (with_header(other_size) + central + end, "is not as long as the directory says"),
        "overlapping": (body + overlapping + end, "weight_0 is not as long as the directory says"),
        "two ends": (body + central + locator + end, "its two ends differ"),
        "fewer": (body + central + at_end(n=len(infos) - 1, m=len(infos) - 1), "directory goes on after its end"),
        "more": (body + central + at_end(n=len(infos) + 1, m=len(infos) + 1), "directory ends too early"),
    }
    for content, message in cases.values():
        (tmp_path / "odd.pt2").write_bytes(content)
        refused(tmp_path / "odd.pt2", message)
    root, records = records_of(saved)
    for name, message in (
        (f"{root}/../evil", "is no name of a record"),
        ("other/x", "is no name of a record"),
        (f"{root}/{MODEL}", "is in it twice"),
    ):
        odd = write_zip(tmp_path / "odd.pt2", root, records, False)
        with zipfile.ZipFile(odd, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name that is there twice
            archive.writestr(name, b"{}")
        refused(odd, message)


# Tensors that are not what the file says


def test_a_record_is_as_long_as_its_tensors(saved):
    """(1) emptied (2) cut (3) longer (4) with sizes, strides or an offset that reach further, or below zero."""
    for change in (lambda data: b"", lambda data: data[:-4], lambda data: data + bytes(4)):
        path = rewrite_zip(saved, lambda name, data, change=change: change(data) if "weight_1" in name else data, True)
        refused(path, r"weight_1 has \d+ bytes, and its tensors need 32")
    place = ("config", "fc.bias", "tensor_meta")
    for field, value in (
        ("sizes", [{"as_int": 9}]),
        ("strides", [{"as_int": 2}]),
        ("storage_offset", {"as_int": 1}),
        ("sizes", [{"as_int": 2**40}]),
        ("sizes", []),
        ("sizes", [{"as_int": -8}]),
        ("strides", [{"as_int": -1}]),
        ("dtype", 8),
        ("dtype", 0),
        ("layout", 1),
        ("sizes", [{"as_expr": {"expr_str": "Integer(8)", "hint": None}}]),
    ):
        path = edit(saved, WEIGHTS, lambda d, f=field, v=value: replaced(d, (*place, f), v))
        refused(path, "is damaged|does not write")


def test_tensors_are_what_the_graph_means(saved):
    """(1) two weights of other sizes swapped (2) a weight of another dtype (3) one that is missing."""
    entries = json.loads(records_of(saved)[1][WEIGHTS])["config"]
    swapped = {**entries, "fc.bias": entries["table.weight"], "table.weight": entries["fc.bias"]}
    refused(
        edit(saved, WEIGHTS, lambda d: {"config": swapped}),
        "fc.bias has another sizes than in the graph|table.weight has",
    )
    as_int = json.loads(json.dumps(entries))
    as_int["fc.bias"]["tensor_meta"]["dtype"] = 4
    refused(edit(saved, WEIGHTS, lambda d: {"config": as_int}), "fc.bias has another dtype than in the graph")
    missing = {name: entry for name, entry in entries.items() if name != "head.weight"}
    refused(edit(saved, WEIGHTS, lambda d: {"config": missing}), "head.weight, is missing")
    refused(edit(saved, WEIGHTS, lambda d: {"config": {}}), "is missing")


def test_records_that_nothing_names_are_refused(saved):
    refused(rewrite_zip(saved, lambda _, data: data, True, {"data/weights/weight_9": b"1234"}), "nothing says what")


def test_a_program_put_together_of_two_is_seen(saved):
    """With right checksums in the zip, which are not those that were written."""

    def other(name, data):
        return data[::-1] if name.endswith("weight_1") else data

    refused(rewrite_zip(saved, other), "its records are not those that were written")


def test_example_inputs_take_no_memory_that_is_not_there(saved):
    huge = edit(saved, OURS, lambda d: {**d, "example_inputs": [["uint8", [1 << 62], "cpu"], 2.0, "plain"]})
    refused(huge, "cannot be read with torch")
    large = edit(saved, OURS, lambda d: {**d, "example_inputs": [["uint8", [1 << 33], "cpu"], 2.0, "plain"]})
    (ids,), _ = int8compile.load(large).example_inputs
    assert ids.shape == (1 << 33,)
    assert ids[1 << 32] == 0
    for odd in ({}, 3, [3], [["int64", "x", "cpu"], 2.0, "plain"], [["nodtype", [1], "cpu"], 2.0, "plain"]):
        refused(edit(saved, OURS, lambda d, odd=odd: {**d, "example_inputs": odd}), "cannot be read with torch")


# What is kept of tensors


@pytest.mark.parametrize("kind", ["a slice", "rows", "every second", "expanded", "transposed", "overlapping", "empty"])
def test_tensors_that_do_not_fill_their_memory(tmp_path, kind):
    """Nothing of the memory around them is written, and they are what they were."""
    big = torch.arange(64 * 32.0).reshape(64, 32)
    parts = {
        "a slice": (big[3:7, 2:18],),
        "rows": (big[3:7],),
        "every second": (big[:8, ::2],),
        "expanded": (big[:1, :16].expand(4, 16),),
        "transposed": (big[:16].t(),),
        "overlapping": (big[4:20], big[8:24], big[60:]),
        "empty": (big[:0], big[3]),
    }[kind]

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            for i, part in enumerate(parts):
                self.register_parameter(f"p{i}", nn.Parameter(part, requires_grad=False))

        def forward(self, x):
            return [x + p.sum() + p for p in self.parameters()]

    program = torch.export.export(Holds(), (torch.ones(()),))
    int8compile.save(program, tmp_path / "m.pt2")
    back = int8compile.load(tmp_path / "m.pt2")
    for expected, actual in zip(program.module()(torch.ones(())), back.module()(torch.ones(())), strict=True):
        assert torch.equal(expected, actual)
    for name, value in program.state_dict.items():
        assert back.state_dict[name].stride() == value.stride()
    _, records = records_of(tmp_path / "m.pt2")
    written = sum(len(data) for name, data in records.items() if "/weight_" in name)
    if kind == "overlapping":  # they still share theirs
        a, b = back.state_dict["p0"], back.state_dict["p1"]
        assert a[4:].data_ptr() == b.data_ptr()
        assert written == 60 * 32 * 4
    else:
        assert written <= max(2 * sum(p.numel() for p in parts), 4 * 32) * 4


def test_a_big_archive_is_read(tmp_path):
    """Sizes and positions that need more than 32 bits, as Python's zipfile writes them; the bytes are none."""
    from int8compile.programs.records import Records

    path, size = tmp_path / "big.pt2", (1 << 32) + 5
    names, at, central, content = ["m/a", "m/b"], 0, b"", {}
    with path.open("wb") as file:
        for name, length in zip(names, (size, 1), strict=True):
            extra = struct.pack("<2H2Q", 1, 16, length, length)
            crc = zlib.crc32(b"x") if length == 1 else 0
            full = 0xFFFFFFFF
            file.seek(at)
            file.write(
                struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, full, full, 3, 20) + name.encode() + extra
            )
            content[name] = file.tell()
            wide = struct.pack("<2H3Q", 1, 24, length, length, at)
            central += struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", 45, 45, 0, 0, 0, 33, crc, full, full, 3, 28, 0, 0, 0, 0, full
            )
            central += name.encode() + wide
            at = content[name] + length
        file.seek(at - 1)
        file.write(b"x" + central)
        file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(central), at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at + len(central), 1))
        file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(central), 0xFFFFFFFF, 0))
    with zipfile.ZipFile(path) as archive:
        assert [info.file_size for info in archive.infolist()] == [size, 1]
    with path.open("rb") as file:
        records = Records(file, "big.pt2", "an archive")
        assert [(name, records[name].start, records[name].size) for name in records.names()] == [
            ("a", content["m/a"], size),
            ("b", content["m/b"], 1),
        ]
        assert records.read("b") == b"x"
