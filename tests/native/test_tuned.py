"""The file of the tuned table: what is kept is found again, and what is not right is not used, said once."""

import hashlib
import json
import os

import pytest
import torch

from int8compile import cpuinfo
from int8compile.native import builder, loader, notices, tuned
from int8compile.native.doctor import diagnose
from int8compile.native.tuned import Choice, where_of

KEYS = {"dtype": "float32", "heads": 6, "kv_heads": 2}
PLACE = {"isa": "avx2", "rows": 16, "k": 512, "cols": 1024}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    loader.load("cpu")
    monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("INT8COMPILE_IGNORE_TUNED")
    notices.warn_once.cache_clear()
    tuned.forget()
    yield tmp_path / "cache"
    monkeypatch.setenv("INT8COMPILE_IGNORE_TUNED", "1")
    tuned.forget()
    tuned.apply_to_kernels()


def folded(threads=2, name="folded", **keys):
    return Choice("fold_queries", threads, where_of(**{**KEYS, **keys}), name, "as it is", 1.5)


def keep(*choices, threads=2, day="2026-01-02"):
    return tuned.keep(choices, [(choice.tunable, choice.where) for choice in choices], threads, day)


def found(threads=2, **keys):
    tuned.forget()
    return tuned.choice("fold_queries", threads=threads, **{**KEYS, **keys})


def test_nothing_is_tuned_at_first(folder):
    assert found() is None
    assert tuned.inspect() == tuned.Found(tuned.Table())
    assert not folder.exists()


def test_what_is_kept_is_found_for_the_same_threads_and_place():
    keep(folded())
    assert found() == "folded"
    assert found(threads=1) is None
    assert found(heads=12) is None
    assert found(dtype="bfloat16") is None
    assert tuned.choice("something", threads=2, **KEYS) is None


def test_what_is_measured_again_takes_the_earlier_choices_place():
    keep(folded(), folded(heads=12))
    keep(folded(threads=1), threads=1, day="2026-03-04")
    tuned.keep([], [("fold_queries", where_of(**KEYS))], 2, "2026-05-06")  # whose default is the fastest now
    assert (found(), found(heads=12), found(threads=1)) == (None, "folded", "folded")
    assert tuned.inspect().table.days == {1: "2026-03-04", 2: "2026-05-06"}


def test_a_table_is_removed():
    path = keep(folded())
    assert tuned.clear() == path
    assert not path.exists()
    assert found() is None
    assert tuned.clear() is None


def test_a_variable_leaves_it_unread(monkeypatch):
    keep(folded())
    monkeypatch.setenv("INT8COMPILE_IGNORE_TUNED", "1")
    assert found() is None
    assert "INT8COMPILE_IGNORE_TUNED" in tuned.inspect().problem


def signed(body):
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}).encode()


def changed(**fields):
    def change(content):
        body = json.loads(content)
        del body["sha256"]
        return signed({**body, **fields})

    return change


def entry(**fields):
    whole = {
        "tunable": "fold_queries",
        "threads": 2,
        "where": KEYS,
        "choice": "folded",
        "default": "as it is",
        "gain": 1.5,
    }
    return changed(choices=[{**whole, **fields}])


def without(*names):
    def change(content):
        body = json.loads(content)
        return signed({name: value for name, value in body.items() if name not in ("sha256", *names)})

    return change


DAMAGED, NO_TABLE = "is damaged, or has been changed", "is no table"
HOSTILE = {
    "empty": (lambda content: b"", DAMAGED),
    "truncated": (lambda content: content[: len(content) // 2], DAMAGED),
    "edited": (lambda content: content.replace(b'"folded"', b'"unfolded"'), DAMAGED),
    "binary": (lambda content: bytes(range(256)), DAMAGED),
    "a list": (lambda content: b"[]", DAMAGED),
    "no checksum": (lambda content: json.dumps({"choices": []}).encode(), DAMAGED),
    "deep": (lambda content: b"[" * 500_000, DAMAGED),
    "huge": (lambda content: b" " * (1 << 20) + content, "is too large"),
    "huge number": (lambda content: b'{"a": ' + b"9" * 100_000 + b"}", DAMAGED),
    "another format": (changed(choices={"a": 1}), NO_TABLE),
    "choices of text": (changed(choices=["folded"]), NO_TABLE),
    "no choices": (without("choices"), NO_TABLE),
    "no days": (without("days"), NO_TABLE),
    "no machine": (without("made_for"), "was made for another CPU"),
    "a machine that is a list": (changed(made_for=[]), "was made for another CPU"),
    "days of letters": (changed(days={"two": "2026-01-02"}), NO_TABLE),
    "threads of text": (entry(threads="2"), NO_TABLE),
    "threads by truth": (entry(threads=True), NO_TABLE),
    "negative threads": (entry(threads=-2), NO_TABLE),
    "a place of floats": (entry(where={"heads": 6.0}), NO_TABLE),
    "a place of lists": (entry(where={"heads": [6]}), NO_TABLE),
    "no place": (entry(where=None), NO_TABLE),
    "lines in a name": (entry(choice="folded\n2 1 1 1 dot"), NO_TABLE),
    "no name": (entry(choice=None), NO_TABLE),
    "a gain of text": (entry(gain="much"), NO_TABLE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_right_is_not_used_and_said_once(name, caplog):
    path = keep(folded())
    change, complaint = HOSTILE[name]
    path.write_bytes(change(path.read_bytes()))
    for _ in range(3):
        assert found() is None
    tuned.apply_to_kernels()
    assert len(caplog.records) == 1
    assert f"the tuned table is not used: {path} {complaint}" in caplog.text
    assert "`int8compile tune --clear` removes it" in caplog.text
    keep(folded())  # and a new one takes its place
    assert found() == "folded"


def test_files_that_are_none(folder, caplog):
    path = keep(folded())
    content = path.read_bytes()
    kinds = {
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a link": lambda: path.symlink_to(folder / "elsewhere"),
        "a loop": lambda: path.symlink_to(path),
    }
    (folder / "elsewhere").write_bytes(content)
    for kind, make in kinds.items():
        path.unlink()
        make()
        assert found() is None, kind
        assert tuned.inspect().problem, kind
        path.rmdir() if kind == "a folder" else path.unlink()
        path.write_bytes(content)


def test_a_file_that_others_may_write_to(caplog):
    path = keep(folded())
    path.chmod(0o666)
    assert found() is None
    assert f"every user may write to {path}" in caplog.text


def test_a_table_of_another_version_is_not_touched_and_told_of(monkeypatch, caplog):
    path = keep(folded())
    with monkeypatch.context() as patch:
        patch.setattr(builder, "key", lambda name: "cpu-another")
        with caplog.at_level("INFO"):
            assert found() is None
        assert "a table was tuned by another version" in caplog.text
        assert tuned.inspect().others
        path.rename(tuned._path(make=True))
        assert found() is None
        assert "was made for another version of the kernels" in tuned.inspect().problem


def test_a_table_of_another_cpu(monkeypatch, tmp_path):
    path = keep(folded())
    described = tmp_path / "cpuinfo"
    described.write_text("processor : 0\nmodel name : Another\nflags : fpu\n")
    monkeypatch.setattr(cpuinfo, "CPUINFO", described)
    assert found() is None
    assert tuned.inspect() == tuned.Found(tuned.Table())
    path.rename(tuned._path(make=True))
    assert "was made for another CPU" in tuned.inspect().problem


def test_caches_and_flags_distinguish_cpus(monkeypatch, tmp_path):
    described, caches = tmp_path / "cpuinfo", tmp_path / "cache"
    monkeypatch.setattr(cpuinfo, "CPUINFO", described)
    monkeypatch.setattr(cpuinfo, "CACHES", caches)
    (caches / "index2").mkdir(parents=True)
    keys = []
    for flags, size in (("fpu avx2", "512K"), ("avx2 fpu", "512K"), ("fpu", "512K"), ("fpu avx2", "2048K")):
        described.write_text(f"model name : One\nflags : {flags}\n")
        (caches / "index2" / "size").write_text(f"{size}\n")
        keys.append(cpuinfo.cpu_key())
    assert keys[0] == keys[1]
    assert len(set(keys)) == 3


def test_kernels_that_are_not_there_are_not_taken(caplog):
    isa, native = torch.ops.int8compile_native.isa(), torch.ops.int8compile_native
    before = native.cpu_kernel(16, 1024, 512, 2)
    for name in ("fastest", "dot panel", "amx-2"):
        notices.warn_once.cache_clear()
        caplog.clear()
        keep(Choice(tuned.PRODUCT, 2, where_of(**{**PLACE, "isa": isa}), name, before, 1.5))
        tuned.apply_to_kernels()
        assert native.cpu_kernel(16, 1024, 512, 2) == before
        assert "the tuned table is not used" in caplog.text


def test_choices_for_another_instruction_set_are_not_taken(caplog):
    native = torch.ops.int8compile_native
    keep(Choice(tuned.PRODUCT, 2, where_of(**{**PLACE, "isa": "sve"}), "fastest", "dot", 1.5))
    tuned.apply_to_kernels()
    assert caplog.text == ""
    assert native.cpu_kernel(16, 1024, 512, 2) in native.cpu_kernels().split()


def test_doctor_tells_what_is_tuned():
    assert diagnose()["tuned"]["changes"] == []
    path = keep(folded())
    said = diagnose()["tuned"]
    assert (said["path"], said["days"], said["problem"]) == (str(path), {"2": "2026-01-02"}, None)
    assert said["changes"] == [
        {"tunable": "fold_queries", "threads": 2, "where": KEYS, "choice": "folded", "default": "as it is", "gain": 1.5}
    ]
    path.write_bytes(b"")
    said = diagnose()
    assert "is damaged" in said["tuned"]["problem"]
    assert said["tuned"]["changes"] == []


def test_doctor_tells_of_a_variable_that_says_nothing(monkeypatch):
    monkeypatch.setenv("INT8COMPILE_IGNORE_TUNED", "yes")
    assert "INT8COMPILE_IGNORE_TUNED='yes': expected 1, 0 or nothing" in diagnose()["tuned"]["problem"]
