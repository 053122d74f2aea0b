"""The house rules that a machine can check."""

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from checkout import ROOT

import int8compile

#: Each part may import only parts to its left.
FLOORS = [
    ("cpuinfo", "errors", "hooks", "limits", "torch_internals"),
    ("config", "files", "graph", "ops", "report"),
    ("calibration", "native", "selection", "session"),
    ("weights", "passes", "handoff"),
    ("backend", "modules"),
    ("programs", "explanation", "integrations"),
    ("calibrating", "checkpoints", "testing", "tuning"),
    ("cli",),
]

FILES = [*sorted((ROOT / "int8compile").rglob("*.py")), *sorted((ROOT / "passes").rglob("*.py"))]

#: Private to torch by their names alone, and used outside of torch_internals/.
ALLOWED = {
    "torch._ops.OpOverload": "the type of every operator of torch.ops, which has no public name",
    "torch.utils._pytree": "torch.export's own trees of inputs; torch.utils.pytree has another kind of them",
    "_schema": "of an operator, which the guide to custom operators reads",
    "_version": "of a tensor, since torch 0.4; the weight store reads it for every weight at every call",
}


def part(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "int8compile" else relative[0]


@functools.cache
def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of nested attributes that begin at a name; else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    before = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{before}.{node.attr}" if before else ""


def imported(source: str) -> set[str]:
    """The modules a file imports, and the names it imports from them: in functions, for types and by strings too."""
    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"a relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {text.value for text in ast.walk(node) if isinstance(text, ast.Constant) and text.value}
        elif isinstance(node, ast.Subscript) and dotted(node.value) == "sys.modules":
            found |= {text.value for text in ast.walk(node.slice) if isinstance(text, ast.Constant)}
    return {name for name in found if isinstance(name, str)}


def parts(source: str) -> set[str]:
    """Parts of this package that a file imports."""
    names = (name.split(".") for name in imported(source))
    return {name[1] for name in names if name[0] == "int8compile" and len(name) > 1 and name[1]}


def privates(source: str) -> set[str]:
    """What a file uses of torch that is private: modules, names, and attributes of torch's objects."""
    roots = {"torch": "torch"}
    found = set()
    for name in imported(source):
        if name.split(".")[0] == "torch":
            roots[name.split(".")[-1]] = name
            found |= _private_prefix(name)
    parts_of_others = {id(node.value) for node in nodes(source) if isinstance(node, ast.Attribute)}
    for node in nodes(source):
        if isinstance(node, ast.Attribute):
            first, *rest = dotted(node).split(".")
            if first in roots and id(node) not in parts_of_others:
                found |= _private_prefix(".".join([roots[first], *rest]))
            elif node.attr in _TORCHS_OWN and first not in roots and ast.unparse(node.value) not in _OUR_OWN:
                found.add(node.attr)
        elif isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr"):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and a.value in _TORCHS_OWN}
    return {name for name in found if not any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED)}


#: whose attributes are ours, or those of a class that ours extends
_OUR_OWN = ("self", "cls", "super()")


def _private_prefix(name: str) -> set[str]:
    names = name.split(".")
    return {name} if any(n.startswith("_") and not n.startswith("__") for n in names) else set()


def _attributes_of_torch() -> set[str]:
    """Private attributes of tensors, storages, operators, modules and graphs."""
    tensor, graph = torch.zeros(1), torch.fx.Graph()
    objects = [tensor, tensor.untyped_storage(), torch.ops.aten.add, torch.ops.aten.add.Tensor, torch.nn.Linear(1, 1)]
    objects += [torch.compile(torch.nn.Linear(1, 1)), graph, graph.placeholder("x")]
    names = {name for thing in objects for name in dir(thing)} | {"_dynamo_source"}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


_TORCHS_OWN = _attributes_of_torch()


def test_imports_point_one_way():
    assert len(FLOORS) <= 8
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in FILES:
        here = part(path)
        if here == "__init__":  # the package's own, which ties the parts together: public names and hooks
            continue
        for other in parts(path.read_text()) - {here}:
            assert other in floor, f"{path.name} imports {other}, which is on no floor"
            assert floor[other] < floor[here], f"{path.name} ({here}) imports {other}, which is not below it"


@pytest.mark.parametrize(
    "source",
    [
        "import int8compile.cli",
        "from int8compile import cli",
        "from int8compile.cli.app import main",
        "def f():\n    from int8compile.cli import app",
        "if TYPE_CHECKING:\n    from int8compile import cli as c",
        "importlib.import_module('int8compile.cli.app')",
        "import_module(f'int8compile.cli.{name}')",
        "__import__('int8compile.cli')",
        "sys.modules['int8compile.cli']",
    ],
)
def test_every_kind_of_import_is_seen(source):
    assert parts(source) == {"cli"}


def test_one_place_touches_torchs_private_interfaces():
    for path in FILES:
        if path.parent.name != "torch_internals":
            found = privates(path.read_text())
            assert not found, f"{path.relative_to(ROOT)} uses {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("from torch._inductor import config", "torch._inductor.config"),
        ("from torch.nn.modules.dropout import _DropoutNd", "torch.nn.modules.dropout._DropoutNd"),
        ("import torch._dynamo", "torch._dynamo"),
        ("importlib.import_module('torch._dynamo')", "torch._dynamo"),
        ("torch._C._nn.linear", "torch._C._nn.linear"),
        ("from torch import fx\nfx._symbolic_trace", "torch.fx._symbolic_trace"),
        ("import torch.nn as nn\ntorch.nn._reduction", "torch.nn._reduction"),
        ("x.untyped_storage()._cdata", "_cdata"),
        ("module._parameters", "_parameters"),
        ("getattr(model, '_orig_mod', model)", "_orig_mod"),
    ],
)
def test_every_use_of_a_private_interface_is_seen(source, name):
    assert name in privates(source)


def test_what_is_ours_or_public_is_no_private_interface():
    assert not privates("import torch\nself._parameters\nnamedtuple._replace(a=1)\ntorch.fx.Graph().__class__")


def test_one_file_reads_environment_variables():
    for path in FILES:
        if path.name not in ("config.py", "builder.py", "wgmma.py"):  # those of programs they start
            assert not re.search(r"\benviron\b|getenv", path.read_text()), path


def test_files_are_short():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        assert path.read_text().count("\n") <= 450, path


def test_public_names_exist_and_are_documented():
    for name in int8compile.__all__:
        assert getattr(int8compile, name).__doc__, name
    assert set(int8compile.__all__) <= set(dir(int8compile))


def test_examples_and_benchmarks_do_not_import_one_another():
    for here, other in (("examples", "benchmarks"), ("benchmarks", "examples")):
        files = sorted((ROOT / here).rglob("*.py"))
        assert files
        for path in files:
            for node in ast.walk(ast.parse(path.read_text())):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert other not in {name.split(".")[0] for name in modules}, f"{path} imports {other}"
