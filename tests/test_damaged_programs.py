"""``load`` on files that are damaged or made to deceive: refused by name, or the very program; nothing in them runs."""

import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from damage import places, replaced, rewrite_zip, write_zip
from torch import nn
from torch.utils import _pytree as pytree

import int8compile
from int8compile.errors import ExportError, ProgramFileError
from int8compile.model_json import check_model
from int8compile.size_expressions import is_size_expression

IDS = torch.tensor([[3, 4, 5], [6, 7, 8]])
ROOT = Path(__file__).resolve().parent.parent
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
OURS = "extra/int8compile.json"


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


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    shapes = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}, "scale": None, "mode": None}
    keywords = {"scale": 2.0, "mode": "plain"}
    torch.manual_seed(0)
    program = int8compile.export(Model().eval(), (IDS,), keywords, shapes, {"min_features": 0})
    path = tmp_path_factory.mktemp("programs") / "model.pt2"
    int8compile.save(program, path)
    return path


def edit(path: Path, record: str, change, forged: bool = True) -> Path:
    """A copy of a program with another JSON document, whose checksums are right."""

    def changed(name, data):
        return json.dumps(change(json.loads(data))) if name == record else data

    return rewrite_zip(path, changed, forged=forged)


def refused(path: Path, message: str) -> None:
    with pytest.raises(ProgramFileError, match=message):
        int8compile.load(path)


# Random damages, in a process of their own


def fuzz(saved: Path, folder: Path, seed: int, count: int) -> dict:
    path = folder / "model.pt2"
    path.write_bytes(saved.read_bytes())
    command = [sys.executable, str(ROOT / "tests" / "damage.py"), str(path), str(seed), str(count)]
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
    for at in range(start, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            program = int8compile.load(path)
        except ProgramFileError:
            continue
        assert torch.equal(program.module()(IDS, scale=2.0, mode="plain")["logits"], expected), at


# Zip files that two readers read in two ways


def records_of(path: Path) -> tuple[str, dict[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        return infos[0].filename.split("/")[0], {i.filename.split("/", 1)[1]: archive.read(i) for i in infos}


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
        fields = dict(zip(("mark", "a", "b", "n", "m", "size", "start", "note"), struct.unpack("<4s4H2IH", end)))
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
    locator = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, len(infos), len(infos), len(central), directory - 1)
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
    for name, (content, message) in cases.items():
        (tmp_path / "odd.pt2").write_bytes(content)
        with pytest.raises(ProgramFileError, match=message):
            int8compile.load(tmp_path / "odd.pt2")
            pytest.fail(name)
    root, records = records_of(saved)
    for name, message in (
        (f"{root}/../evil", "is no name of a record"),
        ("other/x", "is no name of a record"),
        (f"{root}/{MODEL}", "is in it twice"),
    ):
        odd = write_zip(tmp_path / "odd.pt2", root, records, False)
        with zipfile.ZipFile(odd, "a") as archive, pytest.warns(UserWarning) if "json" in name else _nothing():
            archive.writestr(name, b"{}")
        refused(odd, message)


class _nothing:  # noqa: N801
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


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
    refused(edit(saved, WEIGHTS, lambda d: {"config": swapped}), "fc.bias has another sizes than in the graph|table.weight has")
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


# Code in the JSON


def node(target: str, inputs: dict) -> dict:
    arguments = [{"name": name, "arg": arg, "kind": 1} for name, arg in inputs.items()]
    output = {"as_tensor": {"name": "evil"}}
    return {"target": target, "inputs": arguments, "outputs": [output], "metadata": {}, "name": "evil"}


def calling(document: dict, target: str, inputs: dict) -> dict:
    graph = document["graph_module"]["graph"]
    graph["nodes"].insert(0, node(target, inputs))
    graph["tensor_values"]["evil"] = graph["tensor_values"]["b_offset"]
    return document


def text(value: str) -> dict:
    return {"as_string": value}


@pytest.mark.parametrize(
    ("target", "inputs"),
    [
        ("torch.os.system", {"command": text("touch x")}),
        ("torch.load", {"f": text("x")}),
        ("torch.hub.load", {"repo": text("x"), "model": text("y")}),
        ("torch.ops.load_library", {"path": text("x.so")}),
        ("torch._C._cuda_init", {}),
        ("_operator.methodcaller", {"name": text("x")}),
        ("_operator.attrgetter", {"name": text("x")}),
        ("math.factorial", {"n": {"as_int": 10**7}}),
        ("#ext:op", {}),
        ("print", {}),
        ("torch.ops.aten.from_file.default", {"filename": text("/etc/passwd"), "size": {"as_int": 8}}),
        ("torch.ops.aten.save.default", {"item": {"as_int": 1}, "filename": text("x")}),
        ("torch.ops.aten.no_such_operator.default", {}),
        ("torch.ops.debugprims.load_tensor.default", {"name": text("x")}),
        ("torch.ops.inductor._reinterpret_tensor.default", {}),
        ("torch.ops.profiler._record_function_enter.default", {"name": text("x")}),
        ("torch.ops.higher_order.call_torchbind", {}),
        ("torch.ops.higher_order.aoti_call_delegate", {"path": text("x.so")}),
        ("torch.ops.higher_order.run_const_graph", {}),
        ("torch.ops.higher_order.cond", {"function": {"as_operator": "torch.os.abort"}}),
    ],
)
def test_operators_that_a_program_may_not_call(saved, target, inputs):
    refused(edit(saved, MODEL, lambda d: calling(d, target, inputs)), "does not write; it is not read: .*nodes.0.")


def test_operators_of_other_libraries_are_called_if_they_are_named(tmp_path):
    ran = []

    @torch.library.custom_op("int8compile_test_library::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        ran.append(x)
        return x * 2

    twice.register_fake(torch.empty_like)

    class Calls(nn.Module):
        def forward(self, x):
            return twice(x)

    program = torch.export.export(Calls(), (torch.ones(2),))
    int8compile.save(program, tmp_path / "m.pt2")
    with pytest.raises(ProgramFileError, match=r"say load\(path, operators=\['int8compile_test_library'\]\)"):
        int8compile.load(tmp_path / "m.pt2")
    back = int8compile.load(tmp_path / "m.pt2", operators=["int8compile_test_library"])
    assert back.module()(torch.ones(2)).tolist() == [2, 2]
    assert ran


IMPORT = "__import__('evil_module')"


def in_expression(d):
    return replaced(d, ("graph_module", "graph", "tensor_values", "ids", "sizes", 0, "as_expr", "expr_str"), IMPORT)


def in_guards(d):
    return replaced(d, ("guards_code",), [IMPORT])


def in_text_input(d):
    graph = d["graph_module"]["graph"]
    at = next(i for i, value in enumerate(graph["inputs"]) if "as_string" in value)
    value = text("' or __import__(\"evil_module\") or '")
    d = replaced(d, ("graph_module", "graph", "inputs", at), value)
    return replaced(d, ("graph_module", "signature", "input_specs", at, "constant_input", "value"), value)


def in_input_name(d):
    """As a default of the function that is made of the graph."""
    place = next(p for p in places(d) if p[-2:] == ("constant_input", "name") and d_at(d, p) == "mode")
    return replaced(d, place, f"mode={IMPORT}")


def in_value_name(d):
    return json.loads(json.dumps(d).replace('"mul"', json.dumps(f"mul = {IMPORT}\n    mul")))


def in_argument_name(d):
    """Of a forward function."""
    place = ("graph_module", "module_call_graph", 0, "signature", "forward_arg_names")
    return replaced(d, place, ["ids", "scale", f"mode={IMPORT}"])


def in_keyword(d):
    place = ("graph_module", "module_call_graph", 0, "signature", "in_spec")
    return replaced(d, place, d_at(d, place).replace("mode", f"': {IMPORT}, 'mode"))


def in_parameter(d):
    """A path, which stands in ``getattr(self, "...")``."""
    return json.loads(json.dumps(d).replace('"fc.bias"', json.dumps(f"fc.x\") or {IMPORT}#")))


def in_enum(d):
    place = ("graph_module", "module_call_graph", 0, "signature", "out_spec")
    enum = {"__enum__": True, "fqn": "evil_module:Evil", "name": "A"}
    tree = [1, {"type": "builtins.list", "context": json.dumps([enum]), "children_spec": []}]
    return replaced(d, place, json.dumps(tree))


def in_defaultdict(d):
    place = ("graph_module", "module_call_graph", 0, "signature", "out_spec")
    context = {"default_factory_module": "evil_module", "default_factory_name": "A", "dict_context": []}
    tree = [1, {"type": "collections.defaultdict", "context": context, "children_spec": []}]
    return replaced(d, place, json.dumps(tree))


def d_at(value, path):
    for key in path:
        value = value[key]
    return value


@pytest.mark.parametrize(
    "change",
    [
        in_expression,
        in_guards,
        in_text_input,
        in_input_name,
        in_value_name,
        in_argument_name,
        in_keyword,
        in_parameter,
        in_enum,
        in_defaultdict,
    ],
)
def test_nothing_in_the_json_is_run(saved, tmp_path, monkeypatch, change):
    """torch 2.13 runs most of these, some when the program is loaded, some when its module is made."""
    marker = tmp_path / "ran"
    (tmp_path / "evil_module.py").write_text(f"__import__('pathlib').Path({str(marker)!r}).touch()")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = edit(saved, MODEL, change)
    if change is in_parameter:
        path = edit(path, WEIGHTS, change)
    with pytest.raises(ProgramFileError, match="does not write; it is not read"):
        int8compile.load(path).module()
    assert not marker.exists()


def test_json_that_two_readers_read_in_two_ways(saved):
    """(1) a key twice (2) UTF-16 (3) NaN (4) a byte order mark (5) depth (6) numbers without end."""

    def model(change):
        return rewrite_zip(saved, lambda name, data: change(data) if name == MODEL else data, forged=True)

    for change in (
        lambda data: data.replace(b'"guards_code"', b'"guards_code": [], "guards_code"'),
        lambda data: data.decode().encode("utf-16"),
        lambda data: data.replace(b'"as_float": 2.0', b'"as_float": NaN'),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: b"[" * 100_000 + b"]" * 100_000,
        lambda data: data.replace(b'"as_float": 2.0', b'"as_float": ' + b"9" * 10_000),
    ):
        refused(model(change), "models/model.json cannot be read")
    deep = b'{"as_graph": {"name": "a", "graph": ' * 300 + b"{}" + b"}}" * 300
    refused(model(lambda data: data.replace(b'{"as_float": 6.0}', deep)), "not read|cannot be read")


@pytest.mark.parametrize(
    ("expression", "fine"),
    [
        ("Symbol('s27', positive=True, integer=True)", True),
        ("Mul(Integer(32), Symbol('s27', positive=True, integer=True))", True),
        ("Add(Integer(-1), FloorDiv(Symbol('s0', integer=True), Integer(3)))", True),
        ("Pow(Symbol('s0', integer=True), Integer(2))", True),
        ("Float('0.33333333333333331', precision=53)", True),
        ("Symbol('s27').__class__", False),
        ("Symbol('x y')", False),
        ("Symbol('u999999999999')", False),
        ("S('1')", False),
        ("sympify('1')", False),
        ("[1]", False),
        ("lambda: 1", False),
        ("Symbol(*'s')", False),
        ("Mul(Integer(2), **{})", False),
        ("Pow(Integer(10), Integer(10000000000))", False),
        ("Pow(Pow(Pow(Integer(9), Integer(99)), Integer(99)), Integer(99))", False),
        ("Pow(Integer(10), Symbol('s0'))", False),
        ("LShift(Integer(1), Integer(100000000000))", False),
        ("Add(" * 5000 + "Integer(1)" + ")" * 5000, False),
        ("Float('1e999999999', precision=53)", False),
        ("Float('1', precision=100000000)", False),
        ("__import__('os')", False),
        ("(yield)", False),
        ("Integer(1) if 1 else 2", False),
        ("", False),
    ],
)
def test_expressions_of_sizes(expression, fine):
    assert is_size_expression(expression) is fine


def test_what_load_would_refuse_is_not_saved(tmp_path):
    """Such as a key in the way of the code that torch makes of a program."""

    class Keyed(nn.Module):
        def forward(self, x):
            return x["it's"] + 1

    program = torch.export.export(Keyed(), ({"it's": torch.ones(2)},))
    with pytest.raises(ExportError, match="load could not read the program back: .*it's"):
        int8compile.save(program, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_each_field_of_the_model_has_its_type(saved):
    """Each value of the JSON replaced by each of these, and each key left out: refused, or as torch's default."""
    model = json.loads(records_of(saved)[1][MODEL])
    from int8compile.model_json import NotWritten

    free = ("metadata", "hint", "kind", "name", "is_hop_single_tensor_return", "index", "min_val", "max_val")
    for path in places(model):
        value = d_at(model, path)
        for odd in (None, True, 1, 1.5, "x y", [3], {"x": 3}):
            if type(odd) is type(value) or {type(odd), type(value)} == {int, float}:
                continue
            if odd is None and path[-1] in (*free, "signature", "forward_arg_names"):
                continue
            if path[-1] in ("hint", "kind", "is_hop_single_tensor_return", "index", "min_val", "max_val", "signature"):
                continue
            if path[-2:-1] in (("metadata",), ("opset_version",)) and type(odd) is str:
                continue
            with pytest.raises(NotWritten):
                check_model(replaced(model, path, odd), ())
                pytest.fail(f"{path}: {value!r} -> {odd!r}")


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
    from int8compile.records import Records

    path, size = tmp_path / "big.pt2", (1 << 32) + 5
    names, at, central, content = ["m/a", "m/b"], 0, b"", {}
    with path.open("wb") as file:
        for name, length in zip(names, (size, 1), strict=True):
            extra = struct.pack("<2H2Q", 1, 16, length, length)
            crc = zlib.crc32(b"x") if length == 1 else 0
            full = 0xFFFFFFFF
            file.seek(at)
            file.write(struct.pack("<4s5H3I2H", b"PK\3\4", 45, 0, 0, 0, 33, crc, full, full, 3, 20) + name.encode() + extra)
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


def test_pytree_names_of_classes_are_known_to_both():
    """The table that the check of trees asks is the one that torch asks."""
    assert "builtins.dict" in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
