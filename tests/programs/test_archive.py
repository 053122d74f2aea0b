"""``save`` and ``load``: what comes back is what went in, half as large, and nothing in a file is unpickled."""

import json
import os
import pickle
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from damage import rewrite_zip
from torch import nn

import int8compile
from int8compile.errors import ExportError, ProgramFileError
from int8compile.files import WORK_FOLDER, replaced
from int8compile.ops import grouped_linear
from int8compile.programs.archive import FORMAT_VERSION


class Model(nn.Module):
    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.table, self.fc, self.head = nn.Embedding(24, size), nn.Linear(size, size), nn.Linear(size, 24, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.ones(size), persistent=False)

    def forward(self, ids, *, scale=2.0):
        hidden = self.fc(self.table(ids)) * scale + self.offset
        return {"logits": self.head(hidden), "hidden": [hidden]}


IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
DYNAMIC = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "scale": None}


@pytest.fixture
def program() -> torch.export.ExportedProgram:
    return int8compile.export(Model().eval(), (IDS,), {"scale": 2.0}, DYNAMIC, {"min_features": 0})


@pytest.fixture
def saved(program, tmp_path) -> Path:
    int8compile.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


class Gathered(nn.Module):
    """As many rows as indices, for a layer of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 24, 16), requires_grad=False)

    def forward(self, x, ids):
        return torch.bmm(self.experts[ids], x.unsqueeze(-1)).squeeze(-1)


def test_inputs_of_one_dynamic_size(tmp_path):
    x, ids = torch.randn(6, 16), torch.tensor([2, 0, 3, 2, 0, -1])
    size = {0: torch.export.Dim.DYNAMIC}
    program = int8compile.export(Gathered().eval(), (x, ids), dynamic_shapes=(size, size), config={"min_features": 0})
    int8compile.save(program, tmp_path / "model.pt2")
    back = int8compile.load(tmp_path / "model.pt2")
    assert any(node.target is grouped_linear for node in back.graph.nodes)
    for rows in (6, 4):
        assert torch.equal(back.module()(x[:rows], ids[:rows]), program.module()(x[:rows], ids[:rows]))
    with pytest.raises((AssertionError, RuntimeError)):
        back.module()(x, ids[:1])


def test_what_comes_back_is_what_went_in(program, saved):
    back = int8compile.load(saved)
    assert {name: value.dtype for name, value in back.state_dict.items()} == {
        name: value.dtype for name, value in program.state_dict.items()
    }
    assert back.state_dict["head.weight"].data_ptr() == back.state_dict["table.weight"].data_ptr()
    assert str(back.graph_signature) == str(program.graph_signature)
    for ids in (IDS, torch.tensor([[1, 2, 3, 4, 5]])):
        expected, actual = program.module()(ids, scale=2.0), back.module()(ids, scale=2.0)
        torch.testing.assert_close(actual, expected)
    # What is kept of the example inputs is what they looked like.
    (ids,), keywords = back.example_inputs
    assert torch.equal(ids, torch.zeros_like(IDS))
    assert keywords == {"scale": 2.0}
    assert program.example_inputs[0][0] is IDS
    assert back.graph_module.meta["int8compile"]["report"]["rewritten"] == 1
    assert back.graph_module.meta["int8compile"]["config"]["min_features"] == 0
    # And once more.
    int8compile.save(back, saved.with_name("again.pt2"))
    torch.testing.assert_close(
        int8compile.load(saved.with_name("again.pt2")).module()(IDS, scale=2.0), program.module()(IDS, scale=2.0)
    )


def test_a_process_that_knows_only_the_package_runs_it(program, saved):
    code = (
        "import sys, torch, int8compile\n"
        "program = int8compile.load(sys.argv[1])\n"
        "out = program.module()(torch.tensor([[3, 4, 5], [6, 7, 8]]), scale=2.0)\n"
        "print(out['logits'].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(saved)], cwd="/", check=True, capture_output=True, text=True)
    torch.testing.assert_close(
        torch.tensor(json.loads(done.stdout)), program.module()(IDS, scale=2.0)["logits"], check_dtype=False
    )


def test_the_file_is_about_half_of_the_16_bit_one(tmp_path):
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))).eval().bfloat16()
    x = torch.randn(2, 512, dtype=torch.bfloat16)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "float.pt2")
    int8compile.save(int8compile.export(model, (x.expand(3, 2, 512).contiguous(),)), tmp_path / "int8.pt2")
    ratio = (tmp_path / "int8.pt2").stat().st_size / (tmp_path / "float.pt2").stat().st_size
    assert 0.48 < ratio < 0.54
    # Nor does it tell where it was made.
    assert str(Path.cwd()).encode() not in (tmp_path / "int8.pt2").read_bytes()


def test_files_that_are_something_else(saved, program, tmp_path):
    """(1) text (2) a truncated program (3) plain torch.export (4) a checkpoint (5) no file."""
    (tmp_path / "text.pt2").write_text("hello")
    (tmp_path / "short.pt2").write_bytes(saved.read_bytes()[:-100])
    torch.export.save(program, tmp_path / "plain.pt2")
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint.pt2")
    for name, message in (
        ("text", "text.pt2 is truncated, or not a file of int8compile.save at all"),
        ("short", "short.pt2 is truncated, or not a file of int8compile.save at all"),
        ("plain", "program of torch.export.save; `import int8compile.ops` and torch.export.load read it"),
        ("checkpoint", "was not written by int8compile.save: it is some other archive"),
    ):
        with pytest.raises(ProgramFileError, match=message):
            int8compile.load(tmp_path / f"{name}.pt2")
    with pytest.raises(FileNotFoundError, match=r"no file .*nothing\.pt2"):
        int8compile.load(tmp_path / "nothing.pt2")


def test_newer_and_damaged_formats(saved):
    def newer(name, data):
        return json.dumps({**json.loads(data), "format_version": FORMAT_VERSION + 1}) if "int8compile" in name else data

    with pytest.raises(ProgramFileError, match=f"has format version {FORMAT_VERSION + 1}.*install a newer one"):
        int8compile.load(rewrite_zip(saved, newer))
    with pytest.raises(ProgramFileError, match=r"damaged: extra/int8compile\.json cannot be read"):
        int8compile.load(rewrite_zip(saved, lambda name, data: b"{" if "int8compile" in name else data))
    for forged in (False, True):
        with pytest.raises(
            ProgramFileError, match=r"damaged: (its records are not those|.* is said to be in .*weight_0)"
        ):
            int8compile.load(rewrite_zip(saved, lambda name, data: None if name.endswith("weight_0") else data, forged))


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1]])
def test_versions_that_are_none(saved, version):
    def change(name, data):
        return json.dumps({**json.loads(data), "format_version": version}) if "int8compile" in name else data

    with pytest.raises(ProgramFileError, match=r"has format version .*; expected a number from 1 to"):
        int8compile.load(rewrite_zip(saved, change))


@pytest.mark.parametrize("version", range(1, FORMAT_VERSION))
def test_older_formats_are_refused(saved, version):
    """Their programs name arguments of operators that these have no more, which torch would leave out."""

    def older(name, data):
        return json.dumps({**json.loads(data), "format_version": version}) if "int8compile" in name else data

    with pytest.raises(ProgramFileError, match=f"has format version {version}, .*export the model again"):
        int8compile.load(rewrite_zip(saved, older))


def test_a_flipped_bit_is_seen(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        (weight,) = (info for info in archive.infolist() if info.filename.endswith("data/weights/weight_0"))
    content[weight.header_offset + 512] ^= 1  # past the header and its padding
    (tmp_path / "flipped.pt2").write_bytes(content)
    with pytest.raises(ProgramFileError, match=r"the bytes of .*weight_0 are not those that were written"):
        int8compile.load(tmp_path / "flipped.pt2")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def test_nothing_is_unpickled(saved):
    """(1) pickled sample inputs (2) a weight (3) a constant marked as a pickle (4) an object (5) an old-style file."""
    bomb = pickle.dumps(Bomb())

    def sample_inputs(name, data):
        return bomb if "sample_inputs" in name else data

    def marked(part):
        def change(name, data):
            if name == f"data/{part}/model_{part}_config.json":
                return data.replace(b'"use_pickle": false', b'"use_pickle": true')
            return bomb if name.startswith(f"data/{part}/") else data

        return change

    def without_mark(name, data):
        return data.replace(b'"use_pickle": false, ', b"") if name.endswith("weights_config.json") else data

    for change in (sample_inputs, marked("weights"), marked("constants"), without_mark):
        with pytest.raises(ProgramFileError, match="holds pickled data"):
            int8compile.load(rewrite_zip(saved, change, forged=True))
    for extra in ("data/constants/custom_obj_0", "data/weights/model.pt", "serialized_state_dict.pt", "version"):
        path = rewrite_zip(saved, lambda _, data: data, forged=True, more={extra: bomb})
        with pytest.raises(ProgramFileError, match=f"holds '{extra}', which int8compile.save does not write"):
            int8compile.load(path)


def test_a_save_that_fails_leaves_the_old_file(program, saved, monkeypatch):
    before = saved.read_bytes()

    def fails(_, file, **__):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        int8compile.save(program, saved)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_what_cannot_be_saved_is_named(program, tmp_path):
    with pytest.raises(ExportError, match=r"path is 'model\.pt'; expected one that ends in '\.pt2'"):
        int8compile.save(program, "model.pt")
    with pytest.raises(ExportError, match="program is Model; expected an ExportedProgram"):
        int8compile.save(Model(), tmp_path / "model.pt2")

    class Strange(torch.Tensor):
        pass

    program.constants["offset"] = torch.ones(32).as_subclass(Strange)
    with pytest.raises(ExportError, match="offset is Strange; only plain tensors can be saved"):
        int8compile.save(program, tmp_path / "model.pt2")


def in_a_process(code: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", SAVES + code, *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


SAVES = """
import os, resource, signal, sys, threading, torch, int8compile
from torch import nn
program = torch.export.export(nn.Sequential(*(nn.Linear(256, 256) for _ in range(8))), (torch.ones(2, 256),))
path = sys.argv[1]
"""


@pytest.mark.parametrize("limit", [0, 100_000, 2_110_000])
def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path, limit):
    """By a bound on the size of files. torch's own writer aborts the process, whenever the disk becomes full."""
    (tmp_path / "m.pt2").write_text("old")
    code = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "try: int8compile.save(program, path)\n"
        "except OSError as error: print(error)\n"
    )
    done = in_a_process(code, tmp_path / "m.pt2", limit)
    assert done.returncode == 0, done.stderr
    assert "save(program, path): m.pt2 cannot be written: File too large" in done.stdout
    assert (tmp_path / "m.pt2").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_save_that_is_stopped_leaves_the_old_file(tmp_path, number):
    """While torch writes, where an exception would abort the process too; SIGTERM is an exception in our commands."""
    (tmp_path / "m.pt2").write_text("old")
    code = (
        "from int8compile.programs.archive_files import ArchiveFile\n"
        "write, calls = ArchiveFile.write, []\n"
        "def stopped(self, data):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 9: signal.raise_signal(signal.{number})\n"
        "    return write(self, data)\n"
        "ArchiveFile.write = stopped\n"
        # A background job of a shell without job control ignores Ctrl-C, and so do its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "try: int8compile.save(program, path)\n"
        "except BaseException as error: print(type(error).__name__, len(calls) > 9)\n"
        "print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
    )
    done = in_a_process(code, tmp_path / "m.pt2")
    kind = {"SIGINT": "KeyboardInterrupt", "SIGTERM": "SystemExit"}[number]
    assert done.stdout.split() == [kind, "True", "True"], done.stderr
    assert (tmp_path / "m.pt2").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(saved, program, tmp_path):
    code = (
        "from int8compile.programs.archive_files import ArchiveFile\n"
        "ArchiveFile.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "int8compile.save(program, path)\n"
    )
    assert in_a_process(code, tmp_path / "m.pt2").returncode == -9
    (left,) = tmp_path.glob(f"{WORK_FOLDER}*")
    with replaced(tmp_path / "other.txt") as path:
        assert not left.exists()
        int8compile.save(program, tmp_path / "m.pt2")
        path.write_text("other")
    assert (tmp_path / "other.txt").read_text() == "other"
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".pt2", ".pt2", ".txt"]


def test_targets_that_are_something_else(program, tmp_path):
    """(1) a folder (2) a file that may not be written to (3) a pipe (4) a link (5) a file in the path (6) its mode."""
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; expected a file to write"):
        int8compile.save(program, tmp_path / "folder.pt2")
    kept = tmp_path / "kept.pt2"
    kept.write_text("kept")
    kept.chmod(0o444)
    with pytest.raises(PermissionError, match=r"kept\.pt2' is read-only; remove it"):
        int8compile.save(program, kept)
    assert kept.read_text() == "kept"
    os.mkfifo(tmp_path / "pipe.pt2")
    with pytest.raises(PermissionError, match="is a device or the like"):
        int8compile.save(program, tmp_path / "pipe.pt2")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        int8compile.save(program, kept / "m.pt2")
    real = tmp_path / "elsewhere" / "real.pt2"
    real.parent.mkdir()
    real.write_text("old")
    real.chmod(0o640)
    (tmp_path / "link.pt2").symlink_to(real)
    int8compile.save(program, tmp_path / "link.pt2")
    assert (tmp_path / "link.pt2").is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    int8compile.load(tmp_path / "link.pt2")


def test_threads_save_and_load(program, saved, tmp_path):
    """At the same time, which torch itself cannot."""
    problems = []

    def work(number):
        try:
            for _ in range(4):
                int8compile.save(int8compile.load(saved), tmp_path / f"{number}.pt2")
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert int8compile.load(tmp_path / "3.pt2").module()(IDS, scale=2.0)["logits"].shape == (2, 3, 24)


def test_the_same_program_gives_the_same_bytes(program, tmp_path):
    int8compile.save(program, tmp_path / "a.pt2")
    int8compile.save(program, tmp_path / "b.pt2")
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()
