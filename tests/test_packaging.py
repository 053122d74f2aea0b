"""``package``: the same logits from Python without the model's source, and from C++ without Python."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import relative_error
from model_zoo import ZOO, output
from test_models import FP32_BOUND
from torch import nn

import int8compile
from int8compile import inductor, native
from int8compile.errors import ExportError, OptionValueError, ProgramFileError
from int8compile.ops._library import REFERENCES

ROOT = Path(__file__).resolve().parent.parent
DYNAMIC = torch.export.Dim.DYNAMIC
# Another batch and another length than those that the packages are made with.
IDS = torch.tensor([[5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [9, 8, 7, 6, 5]])


def mlp() -> torch.export.ExportedProgram:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).eval()
    return int8compile.export(model, (torch.randn(4, 16),), dynamic_shapes=({0: DYNAMIC},), config={"min_features": 0})


def language_model(name: str) -> torch.export.ExportedProgram:
    (entry,) = (entry for entry in ZOO if entry.name == name)
    model, inputs = entry.make()
    shapes = {"input_ids": {0: DYNAMIC, 1: DYNAMIC}, "use_cache": None}
    return int8compile.export(model, (), {**inputs, "use_cache": False}, shapes, config=entry.all_options)


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return language_model("GPT-2")


@pytest.fixture(scope="module")
def package(program, tmp_path_factory) -> Path:
    return int8compile.package(program, tmp_path_factory.mktemp("package") / "model.aoti.pt2")


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd="/", capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )


def test_python_runs_it_without_the_models_source(program, package):
    code = (
        "import json, sys, torch, int8compile\n"
        "model = int8compile.load_package(sys.argv[1])\n"
        "out = model(input_ids=torch.tensor(json.loads(sys.argv[2])), use_cache=False)\n"
        "assert 'transformers' not in sys.modules\n"
        "print(json.dumps(out['logits'].tolist()))"
    )
    done = python(code, package, IDS.tolist())
    expected = program.module()(input_ids=IDS, use_cache=False)["logits"]
    assert relative_error(torch.tensor(json.loads(done.stdout)), expected) < FP32_BOUND


@pytest.fixture(scope="module")
def cmake() -> list[str]:
    """The command, with where to find libtorch."""
    found = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if found is None:
        pytest.skip("cmake is not installed")
    return [found, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]


def build(cmake: list[str], folder: Path, *options: str) -> Path:
    """The example program, built in a folder."""
    configure = [*cmake, "-S", str(ROOT / "examples" / "cpp"), "-B", str(folder), *options]
    for command in (configure, [cmake[0], "--build", str(folder), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run_package"


def check_cpp(program, package, executable: Path) -> None:
    ids = [5, 6, 7, 8, 9, 3, 2]
    # Nothing of Python's is on its way.
    done = subprocess.run(
        [str(executable), str(package), *map(str, ids)], capture_output=True, text=True, check=False, env={}
    )
    assert done.returncode == 0, done.stderr
    actual = torch.tensor([float(line) for line in done.stdout.split()])
    expected = program.module()(input_ids=torch.tensor([ids]), use_cache=False)["logits"][0, -1]
    assert relative_error(actual, expected) < FP32_BOUND


def test_cpp_prints_the_same_logits(program, package, cmake, tmp_path):
    executable = build(cmake, tmp_path / "build", f"-DINT8COMPILE_LIBRARY={native.build('cpu')}")
    check_cpp(program, package, executable)
    usage = subprocess.run([str(executable)], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr.split()[0]) == (2, "usage:")
    missing = subprocess.run([str(executable), "nothing.pt2", "1"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr


@pytest.mark.slow
def test_cmake_builds_the_operators_from_their_sources(program, package, cmake, tmp_path):
    check_cpp(program, package, build(cmake, tmp_path / "build"))


def test_cpp_defines_what_python_defines():
    """The library alone, in a process that has not imported int8compile."""
    code = (
        "import json, sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "assert 'int8compile' not in sys.modules\n"
        "ops = {name: getattr(torch.ops.int8compile, name).default for name in sys.argv[2:]}\n"
        "x = torch.tensor([[1.0, -2.0]])\n"
        "y = ops['linear'](x, torch.tensor([[127, 0]], dtype=torch.int8), torch.tensor([1 / 127]), None, 6.0)\n"
        "tags = {name: [str(tag) for tag in op.tags] for name, op in ops.items()}\n"
        "print(json.dumps([{name: str(op._schema) for name, op in ops.items()}, tags, y.item()]))"
    )
    ops = {op._schema.name.split("::")[1]: op for op in REFERENCES}
    del ops["master_linear"]  # for training, which is Python's
    del ops["quantize_weight"]  # weights are quantised before there is a package
    schemas, tags, value = json.loads(python(code, native.build("cpu"), *ops).stdout)
    assert schemas == {name: str(op._schema) for name, op in ops.items()}
    assert tags == {name: [str(tag) for tag in op.tags] for name, op in ops.items()}
    assert value == pytest.approx(64 / 127 * 2, rel=1e-6)  # code 63.5 -> 64


@pytest.mark.slow
def test_reference_packages_need_no_library(tmp_path):
    program = mlp()
    path = int8compile.package(program, tmp_path / "model.pt2", {"kernels": "reference"})
    code = (
        "import json, sys, torch, torch._inductor\n"
        "model = torch._inductor.aoti_load_package(sys.argv[1])\n"
        "x = torch.arange(48.0).reshape(3, 16) / 10\n"
        "print(json.dumps(model(x).tolist()))\n"
        "assert 'int8compile' not in sys.modules"
    )
    x = torch.arange(48.0).reshape(3, 16) / 10
    assert relative_error(torch.tensor(json.loads(python(code, path).stdout)), program.module()(x)) < FP32_BOUND


@pytest.mark.slow
@pytest.mark.skipif(not inductor.can_compile_for_other_cpus(), reason="this torch compiles for this CPU alone")
def test_portable_packages_and_loaded_programs(tmp_path):
    program, x = mlp(), torch.randn(3, 16)
    int8compile.save(program, tmp_path / "program.pt2")
    loaded = int8compile.load(tmp_path / "program.pt2")
    path = int8compile.package(loaded, tmp_path / "package.pt2", portable=True)
    model = int8compile.load_package(path)
    assert model.get_metadata()["AOTI_CPU_ISA"] == "AVX2"
    assert relative_error(model(x), program.module()(x)) < FP32_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", ["BERT", "ViT", "Llama"])
def test_packages_of_other_models_give_what_they_give_compiled(name, tmp_path):
    (entry,) = (entry for entry in ZOO if entry.name == name)
    model, inputs = entry.make()
    inputs |= {"use_cache": False} if name == "Llama" else {}
    path = int8compile.package(int8compile.export(model, (), inputs, config=entry.all_options), tmp_path / "model.pt2")
    with torch.no_grad():
        expected = output(torch.compile(model, backend="int8", options=entry.all_options)(**inputs))
    assert relative_error(output(int8compile.load_package(path)(**inputs)), expected) < FP32_BOUND


def test_what_cannot_be_packaged_is_named(tmp_path, monkeypatch):
    program = mlp()
    with pytest.raises(ExportError, match=r"path is 'model\.so'; expected one that ends in '\.pt2'"):
        int8compile.package(program, "model.so")
    with pytest.raises(ExportError, match="program is Linear; expected an ExportedProgram"):
        int8compile.package(nn.Linear(2, 2), "model.pt2")
    monkeypatch.setattr(inductor, "can_compile_for_other_cpus", lambda: False)
    with pytest.raises(OptionValueError, match="portable=True: expected False on"):
        int8compile.package(program, "model.pt2", portable=True)
    program.example_inputs = None
    with pytest.raises(ExportError, match="program has no example inputs"):
        int8compile.package(program, "model.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(ProgramFileError, match=r"text\.pt2 is truncated, or no package at all"):
        int8compile.load_package(tmp_path / "text.pt2")
    int8compile.save(mlp(), tmp_path / "program.pt2")
    with pytest.raises(ProgramFileError, match="holds no AOTInductor package"):
        int8compile.load_package(tmp_path / "program.pt2")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt2"):
        int8compile.load_package(tmp_path / "nothing.pt2")
