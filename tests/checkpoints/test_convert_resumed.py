"""``int8compile quantize`` stopped at any moment and run again: the same bytes as in one go, or an error by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from model_zoo import ZOO

from int8compile.checkpoints import convert
from int8compile.checkpoints.convert import lock_file, quantize_folder
from int8compile.errors import CheckpointError, OptionValueError
from int8compile.files import held
from int8compile.integrations.transformers import Int8Config

CONFIG = Int8Config(min_features=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """In several files, with others beside them."""
    folder = tmp_path_factory.mktemp("checkpoints") / "float"
    (entry,) = (entry for entry in ZOO if entry.name == "Llama")
    torch.manual_seed(0)
    entry.make()[0].save_pretrained(folder, max_shard_size="30KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("checkpoints") / "int8"
    quantize_folder(source, target, CONFIG)
    return content(target)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_checkpoint_gives_the_same_bytes(source, whole, tmp_path):
    quantize_folder(source, tmp_path / "again", CONFIG)
    assert content(tmp_path / "again") == whole
    assert not any(name.startswith(".") or "tmp" in name for name in whole)
    assert len({path.stat().st_mode for path in (tmp_path / "again").iterdir()}) == 1  # all for the same readers


KILLED = """
import os, resource, shutil, signal, sys, tempfile
from pathlib import Path
import torch
torch.set_num_threads(1)  # what is forked has no other threads
from int8compile.checkpoints.convert import quantize_folder
from int8compile.integrations.transformers import Int8Config

source, target, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def in_a_child(prepare):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        prepare()
        quantize_folder(source, target, Int8Config(min_features=0))
        code = 0
    except OSError as error:
        print(error)
        code = 3
    finally:
        sys.stdout.flush()
        os._exit(code)

def killed_at(number):
    def prepare():
        seen = []
        def watched(function):
            def call(*args, **kwargs):
                seen.append(1)
                if len(seen) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return call
        # Before each thing that is done to the disk.
        for module, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "rmdir"), (tempfile, "mkdtemp"),
                             (shutil, "copy2"), (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir")):
            setattr(module, name, watched(getattr(module, name)))
    return prepare

def full_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (step, step))
"""


def in_a_process(code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", KILLED + code, *map(str, arguments)]
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500, env=here)
    assert done.returncode == 0, done.stderr
    return done.stdout


KILL = """
number = 1
while in_a_child(killed_at(number)) == -9:
    assert in_a_child(lambda: None) == 0, number
    target.rename(target.with_name(f"{target.name}-{number}"))
    number += step
"""


def killed(source: Path, folder: Path, whole: dict[str, bytes], step: int) -> None:
    in_a_process(KILL, source, folder / "int8", step)
    finished = list(folder.glob("int8-*"))
    assert len(finished) > 40 / step
    for target in finished:
        assert content(target) == whole, target


def test_a_run_that_is_killed_is_resumed_to_the_byte(source, whole, tmp_path):
    killed(source, tmp_path, whole, 9)


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_is_resumed_to_the_byte(source, whole, tmp_path):
    killed(source, tmp_path, whole, 1)


def test_a_full_disk_is_an_error_and_what_is_written_is_kept(source, whole, tmp_path):
    code = "assert in_a_child(full_disk) == 3\nassert in_a_child(lambda: None) == 0\n"
    largest = max(len(data) for name, data in whole.items() if name.endswith(".safetensors"))
    told = in_a_process(code, source, tmp_path / "int8", largest - 1)
    assert "File too large" in told
    assert "int8: " in told
    assert "the same call goes on from there" in told
    assert content(tmp_path / "int8") == whole


def interrupted(source: Path, target: Path, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> None:
    """What a run leaves that is stopped after so many files."""
    real, written = convert._write, []

    def write(*args):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(args[0])
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_write", write)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(source, target, CONFIG)


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_note_of_an_unfinished_run_is_named(source, tmp_path, monkeypatch, left):
    target = tmp_path / "int8"
    interrupted(source, target, monkeypatch)
    (target / "unfinished.json").write_bytes(left)
    before = content(target)
    with pytest.raises(OptionValueError, match=r"unfinished\.json can be read .*; remove the folder to start anew"):
        quantize_folder(source, target, CONFIG)
    assert content(target) == before
    (target / "unfinished.json").write_text("null")
    with pytest.raises(OptionValueError, match="same source and options left unfinished; remove it to start anew"):
        quantize_folder(source, target, CONFIG)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: b"x" * len(data)])
def test_a_file_that_became_bad_is_written_again(source, whole, tmp_path, monkeypatch, damage):
    target = tmp_path / "int8"
    interrupted(source, target, monkeypatch)
    bad = sorted(target.glob("*.safetensors"))[0]
    bad.write_bytes(damage(bad.read_bytes()))
    assert quantize_folder(source, target, CONFIG).resumed == 1
    assert content(target) == whole


def test_a_source_that_changes_is_named(source, tmp_path, monkeypatch):
    """(1) between two runs, weights or description (2) while it is read (3) other versions of the libraries."""
    copy, target = tmp_path / "copy", tmp_path / "int8"
    copy.mkdir()
    for name, data in content(source).items():
        (copy / name).write_bytes(data)
    interrupted(copy, target, monkeypatch)
    before = content(target)
    for name in ("config.json", sorted(copy.glob("*.safetensors"))[0].name):
        times = (copy / name).stat()
        os.utime(copy / name, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
        with pytest.raises(OptionValueError, match="same source and options left unfinished"):
            quantize_folder(copy, target, CONFIG)
        os.utime(copy / name, ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr(convert.transformers, "__version__", "0.1")
        with pytest.raises(OptionValueError, match="same source and options left unfinished"):
            quantize_folder(copy, target, CONFIG)
    assert content(target) == before
    last = sorted(copy.glob("*.safetensors"))[-1]
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        quantize_folder(copy, target, CONFIG, progress=lambda *_: os.utime(last))
    assert not (target / "config.json").exists()


def test_targets_that_cannot_be_made_are_named(source, tmp_path):
    """(1) a file (2) a file in the path (3) a folder that another run is writing to."""
    (tmp_path / "file").write_text("kept")
    for target in (tmp_path / "file", tmp_path / "file" / "int8", tmp_path / "file" / "a" / "int8"):
        with pytest.raises(OptionValueError, match=r"target='.*': expected a folder that can be made"):
            quantize_folder(source, target, CONFIG)
    assert (tmp_path / "file").read_text() == "kept"
    target = tmp_path / "int8"
    target.mkdir()
    with held(lock_file(target)), pytest.raises(OptionValueError, match="no other run is writing to"):
        quantize_folder(source, target, CONFIG)
    quantize_folder(source, target, CONFIG)


def test_what_others_left_behind_does_not_come_along(source, whole, tmp_path, monkeypatch):
    """Half-written files of a killed run, even one that was killed in its first write."""
    target = tmp_path / "int8"
    (target / ".int8compile-saving-xyz").mkdir(parents=True)
    (target / ".int8compile-saving-xyz" / ".tmpAbCdEf").write_text("half")
    quantize_folder(source, target, CONFIG)
    assert content(target) == whole
    assert json.loads(whole["config.json"])["quantization_config"]
