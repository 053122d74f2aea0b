"""``package``: the same logits from Python without the model's source, and from C++ without Python."""

import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from gold import FP32_BOUND, relative_error
from model_zoo import ZOO, output
from torch import nn

import int8compile
from int8compile import handoff
from int8compile.errors import ExportError, OptionValueError, ProgramFileError
from int8compile.native import loader
from int8compile.ops._library import REFERENCES
from int8compile.programs import cpu_targets, packaging
from int8compile.torch_internals import aot

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
    return int8compile.package(program, tmp_path_factory.mktemp("ein päckchen") / "a model.aoti.pt2")


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


def build(cmake: list[str], folder: Path, *options: str, source: Path = ROOT / "examples" / "cpp") -> Path:
    """The example program, built in a folder."""
    configure = [*cmake, "-S", str(source), "-B", str(folder), *options]
    here = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    for command in (configure, [cmake[0], "--build", str(folder), "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=here)
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
    executable = build(cmake, tmp_path / "build", f"-DINT8COMPILE_LIBRARY={loader.build('cpu')}")
    check_cpp(program, package, executable)
    usage = subprocess.run([str(executable)], capture_output=True, text=True, check=False)
    assert (usage.returncode, usage.stderr.split()[0]) == (2, "usage:")
    missing = subprocess.run([str(executable), "nothing.pt2", "1"], capture_output=True, text=True, check=False)
    assert missing.returncode == 1
    assert missing.stderr


@pytest.mark.slow
def test_a_copy_of_the_example_takes_what_the_installed_package_has(program, package, cmake, tmp_path):
    source = tmp_path / "a copy"
    shutil.copytree(ROOT / "examples" / "cpp", source)
    library = f"-DINT8COMPILE_LIBRARY={loader.build('cpu')}"
    check_cpp(program, package, build(cmake, tmp_path / "build here", library, source=source))


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
    schemas, tags, value = json.loads(python(code, loader.build("cpu"), *ops).stdout)
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


def instructions(package: Path) -> str:
    """The machine code in a package, disassembled."""
    with zipfile.ZipFile(package) as archive:
        (library,) = (name for name in archive.namelist() if name.endswith(".so"))
        extracted = archive.extract(library, package.parent / f"{package.stem}-code")
    return subprocess.run(["objdump", "-d", extracted], capture_output=True, text=True, check=True).stdout


X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="instructions of x86-64")


@pytest.mark.slow
@X86
@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.parametrize("isa", ["portable", "avx2", "native"])
def test_generated_code_is_for_the_cpus_that_were_asked_for(isa, tmp_path):
    program, x = mlp(), torch.randn(3, 16)
    int8compile.save(program, tmp_path / "program.pt2")
    path = int8compile.package(int8compile.load(tmp_path / "program.pt2"), tmp_path / "package.pt2", cpu_isa=isa)
    code = instructions(path)
    assert "%xmm" in code
    if isa == "portable":
        assert "%ymm" not in code
    if isa == "avx2":
        assert "%ymm" in code
    if isa != "native":
        assert "%zmm" not in code
    assert relative_error(int8compile.load_package(path)(x), program.module()(x)) < FP32_BOUND


@pytest.mark.slow
@X86
def test_our_kernels_choose_their_instructions_where_a_package_runs(program, package):
    code = (
        "import json, sys, torch, int8compile\n"
        "model = int8compile.load_package(sys.argv[1])\n"
        "print(json.dumps(model(input_ids=torch.tensor([[5, 6]]), use_cache=False)['logits'].tolist()))\n"
        "print(torch.ops.int8compile_native.isa())"
    )
    logits, isa = python(code, package, INT8COMPILE_CPU_ISA="portable").stdout.splitlines()
    assert isa == "portable"
    expected = program.module()(input_ids=torch.tensor([[5, 6]]), use_cache=False)["logits"]
    assert relative_error(torch.tensor(json.loads(logits)), expected) < FP32_BOUND


def test_a_package_runs_where_there_is_no_compiler(program, package, tmp_path):
    """By the reference operators, and it says so."""
    code = (
        "import json, sys, torch, int8compile\n"
        "model = int8compile.load_package(sys.argv[1])\n"
        "print(json.dumps(model(input_ids=torch.tensor([[5, 6]]), use_cache=False)['logits'].tolist()))"
    )
    done = python(code, package, CXX="no-such-compiler", INT8COMPILE_CACHE_DIR=str(tmp_path / "empty"))
    assert "no C++ compiler (no-such-compiler) was found; the slower reference operators are used" in done.stderr
    expected = program.module()(input_ids=torch.tensor([[5, 6]]), use_cache=False)["logits"]
    assert relative_error(torch.tensor(json.loads(done.stdout)), expected) < FP32_BOUND


class Counting(nn.Module):
    """A cache of zeros at first, which each call writes a row of."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(16, 16)
        self.register_buffer("keys", torch.zeros(4, 16))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.keys.index_copy_(0, self.position.reshape(1), self.key(x))
        self.position.add_(1)
        return x @ self.keys.t()


@pytest.mark.slow
@pytest.mark.parametrize("decomposed", [False, True])
def test_a_package_keeps_its_state_from_call_to_call(decomposed, tmp_path):
    x = torch.randn(1, 16)
    program = int8compile.export(Counting().eval(), (x,), config={"min_features": 0})
    program = program.run_decompositions() if decomposed else program
    model, run = program.module(), int8compile.load_package(int8compile.package(program, tmp_path / "model.pt2"))
    for _ in range(3):
        assert relative_error(run(x), model(x)) < FP32_BOUND


def test_what_a_cpu_cannot_run_is_refused_before_it_is_loaded(package, tmp_path, monkeypatch):
    monkeypatch.setattr(packaging, "cpu_flags", lambda: frozenset({"avx"}))
    with pytest.raises(ProgramFileError, match=r"needs what this CPU lacks: .*avx2.*cpu_isa='avx2' or 'portable'"):
        int8compile.load_package(package)
    monkeypatch.undo()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(ProgramFileError, match=r"was made for .*, and this is riscv64; package it here"):
        int8compile.load_package(package)


def test_damaged_packages_are_refused_before_their_code_is_loaded(package, tmp_path, monkeypatch):
    """(1) cut off (2) a bit of the machine code (3) a bit of the directory (4) what it says of itself."""
    monkeypatch.setattr(aot, "load_package", lambda *_: pytest.fail("its code was loaded"))
    whole, path = package.read_bytes(), tmp_path / "damaged.pt2"
    with zipfile.ZipFile(package) as archive:
        (code,) = (info for info in archive.infolist() if info.filename.endswith(".so"))
        directory = archive.start_dir
    for at, message in (
        (code.header_offset + code.file_size // 2, r"the bytes of .*\.so are not those that were written"),
        (directory + 50, "is damaged"),
    ):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ProgramFileError, match=message):
            int8compile.load_package(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ProgramFileError, match="is truncated, or not a package at all"):
        int8compile.load_package(path)
    for about in ("{", "[]", '{"cpu_flags": 3}', '{"cpu_flags": [3]}', '{"cpu_isa": []}', "[" * 100_000):
        monkeypatch.setattr(aot, "package_metadata", lambda _, about=about: {"int8compile": about})
        with pytest.raises(ProgramFileError, match="is damaged: what it says of itself"):
            int8compile.load_package(package)


def test_cpu_targets(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    everything = frozenset(cpu_targets.cpu_target("portable").flags) | frozenset(cpu_targets._V3) | {"avx512f"}
    monkeypatch.setattr(cpu_targets, "cpu_flags", lambda: everything)
    assert cpu_targets.cpu_target(None).name == "avx2"
    assert "avx512f" in cpu_targets.cpu_target("native").flags
    assert "avx512f" not in cpu_targets.cpu_target("avx2").flags
    monkeypatch.setattr(cpu_targets, "cpu_flags", lambda: frozenset({"ssse3"}))
    assert cpu_targets.cpu_target(None).name == "portable"
    with pytest.raises(OptionValueError, match="cpu_isa='avx2': expected one of native, portable"):
        cpu_targets.cpu_target("avx2")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu_targets.cpu_target(None).name == "native"


def test_a_package_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """(1) the disk is full (2) the folder is not there (3) the path is a folder: the last two are seen at once."""
    program, old = mlp(), tmp_path / "model.pt2"
    old.write_text("old")

    def fails(program, file, *_, **__):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(handoff, "compile_package", fails)
    with pytest.raises(OSError, match="disk full"):
        int8compile.package(program, old)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]
    assert old.read_text() == "old"
    with pytest.raises(FileNotFoundError, match=r"package\(program, path\): there is no folder .*missing"):
        int8compile.package(program, tmp_path / "missing" / "model.pt2")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(IsADirectoryError, match="is a folder; expected a file to write"):
        int8compile.package(program, tmp_path / "folder.pt2")


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


def test_what_cannot_be_packaged_is_named(tmp_path):
    program = mlp()
    with pytest.raises(ExportError, match=r"path is 'model\.so'; expected one that ends in '\.pt2'"):
        int8compile.package(program, "model.so")
    with pytest.raises(ExportError, match="program is Linear; expected an ExportedProgram"):
        int8compile.package(nn.Linear(2, 2), "model.pt2")
    with pytest.raises(OptionValueError, match="cpu_isa='avx1024': expected one of"):
        int8compile.package(program, "model.pt2", cpu_isa="avx1024")
    program.example_inputs = None
    with pytest.raises(ExportError, match="program has no example inputs"):
        int8compile.package(program, "model.pt2")
    (tmp_path / "text.pt2").write_text("hello")
    with pytest.raises(ProgramFileError, match=r"text\.pt2 is truncated, or not a package at all"):
        int8compile.load_package(tmp_path / "text.pt2")
    int8compile.save(mlp(), tmp_path / "program.pt2")
    with pytest.raises(ProgramFileError, match=r"holds no AOTInductor package.*int8compile\.load reads"):
        int8compile.load_package(tmp_path / "program.pt2")
    with pytest.raises(ProgramFileError, match="is a folder; expected a package"):
        int8compile.load_package(tmp_path)
    with pytest.raises(ProgramFileError, match="is a folder; expected a file"):
        int8compile.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt2"):
        int8compile.load_package(tmp_path / "nothing.pt2")
