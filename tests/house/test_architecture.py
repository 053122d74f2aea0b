"""The house rules that a machine can check."""

import ast
import re
from pathlib import Path

from checkout import ROOT

import int8compile

#: Each part may import only parts to its left.
FLOORS = [
    ("errors", "limits", "torch_internals"),
    ("config", "files", "graph", "ops", "report"),
    ("native", "selection", "session"),
    ("weights", "passes", "handoff"),
    ("backend", "modules"),
    ("programs", "explanation", "integrations"),
    ("checkpoints", "testing"),
    ("cli",),
]

FILES = [*sorted((ROOT / "int8compile").rglob("*.py")), *sorted((ROOT / "passes").rglob("*.py"))]


def part(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("").parts
    return relative[1] if relative[0] == "int8compile" else relative[0]


def imports(path: Path) -> set[str]:
    """Parts of the package a file imports; those only for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("int8compile"):
            names = node.module.split(".")
            found |= {names[1]} if len(names) > 1 else {alias.name for alias in node.names}
    return found


def test_imports_point_one_way():
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in FILES:
        here = part(path)
        if here == "__init__":
            continue
        for other in imports(path) - {here}:
            assert other in floor, f"{path.name} imports {other}, which is on no floor"
            assert floor[other] < floor[here], f"{path.name} ({here}) imports {other}, which is not below it"


def test_one_place_touches_torchs_compiler_internals():
    for path in FILES:
        if path.parent.name == "torch_internals":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in [module or "", *names]:
                private = name.startswith(("torch._inductor", "torch._dynamo", "torch._functorch", "torch._guards"))
                assert not private, f"{path.name} imports {name}"


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
