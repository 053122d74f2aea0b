"""``load`` on programs whose JSON was made to run something, to be read in two ways, or to take all memory."""

import json
from pathlib import Path

import pytest
import torch
from damage import MODEL, WEIGHTS, at, edit, places, records_of, refused, replaced, rewrite_zip, save_program
from torch import nn

import int8compile
from int8compile.errors import ExportError, ProgramFileError
from int8compile.programs.model_json import NotWrittenError, check_model
from int8compile.programs.size_expressions import is_size_expression


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_program(tmp_path_factory.mktemp("programs") / "model.pt2")


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
        ("torch.ops.aten._reshape_alias.default", {"size": {"as_ints": [2]}, "stride": {"as_ints": [1 << 40]}}),
        ("torch.ops.aten.set_.source_Tensor_storage_offset", {}),
        ("torch.ops.aten.sparse_csr_tensor.crow_col_value_size", {}),
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
    place = next(p for p in places(d) if p[-2:] == ("constant_input", "name") and at(d, p) == "mode")
    return replaced(d, place, f"mode={IMPORT}")


def in_value_name(d):
    return json.loads(json.dumps(d).replace('"mul"', json.dumps(f"mul = {IMPORT}\n    mul")))


def in_argument_name(d):
    """Of a forward function."""
    place = ("graph_module", "module_call_graph", 0, "signature", "forward_arg_names")
    return replaced(d, place, ["ids", "scale", f"mode={IMPORT}"])


def in_keyword(d):
    place = ("graph_module", "module_call_graph", 0, "signature", "in_spec")
    return replaced(d, place, at(d, place).replace("mode", f"': {IMPORT}, 'mode"))


def in_parameter(d):
    """A path, which stands in ``getattr(self, "...")``."""
    return json.loads(json.dumps(d).replace('"fc.bias"', json.dumps(f'fc.x") or {IMPORT}#')))


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
    with pytest.raises(ExportError, match=r"load could not read the program back: .*it's"):
        int8compile.save(program, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_each_field_of_the_model_has_its_type(saved):
    """Each value of the JSON replaced by each of these, and each key left out: refused, or as torch's default."""
    model = json.loads(records_of(saved)[1][MODEL])
    free = ("metadata", "hint", "kind", "name", "is_hop_single_tensor_return", "index", "min_val", "max_val")
    taken = []
    for path in places(model):
        value = at(model, path)
        for odd in (None, True, "x y", [3]):
            if type(odd) is type(value) or {type(odd), type(value)} == {int, float}:
                continue
            if odd is None and path[-1] in (*free, "signature", "forward_arg_names"):
                continue
            if path[-1] in ("hint", "kind", "is_hop_single_tensor_return", "index", "min_val", "max_val", "signature"):
                continue
            if path[-2:-1] in (("metadata",), ("opset_version",)) and type(odd) is str:
                continue
            try:
                check_model(replaced(model, path, odd), ())
            except NotWrittenError:
                continue
            taken.append((path, value, odd))
    assert taken == []
