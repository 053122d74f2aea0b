"""Building the CUDA kernels where there is no GPU: for which architectures, with what, how they compile and load."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from importlib import resources
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

from int8compile.errors import KernelBuildError
from int8compile.native import loader, notices, nvidia, providers, wgmma
from int8compile.ops._library import REFERENCES

SOURCES = Path(str(resources.files("int8compile.csrc"))) / "cuda"
KERNELS = sorted(path.name for path in SOURCES.glob("*.cu"))
_FOUND = [Path("/usr/local/cuda"), *(Path(path).parents[1] for path in [shutil.which("nvcc")] if path)]
CUDA_HOME = next((home for home in _FOUND if (home / "include" / "cuda_runtime.h").exists()), None)
NVCC = None if CUDA_HOME is None else str(CUDA_HOME / "bin" / "nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc (the CUDA toolkit)")

# What torch's builder passes to nvcc beside our flags.
INJECTED = [
    *(f"-D__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")),
    "-D__CUDA_NO_HALF2_OPERATORS__",
    "--expt-relaxed-constexpr",
]
# The most registers a kernel may use, by the blocks that have to fit on a multiprocessor: two of skinny's 256 threads,
# one of the 256 of gemm's largest tile (its small ones use half), one of wgmma's 384.
REGISTERS = {"quantize_rows": 64, "zero": 40, "gather": 48, "skinny": 96, "gemm": 248, "wgmma_gemm": 168}


@functools.cache
def compiled(source: str, architecture: str, standard: str = "c++17") -> tuple[str, Path]:
    """nvcc's messages about a source, and the object."""
    folder = Path(tempfile.mkdtemp(prefix="int8compile-nvcc-"))
    target = folder / f"{source}.o"
    flags = [f"-std={standard}", "-O3", *INJECTED, *nvidia.nvcc_flags((architecture,)), "-Xptxas", "-v"]
    command = [str(NVCC), *flags, "-c", str(SOURCES / source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, target


def resources_of(messages: str) -> dict[str, tuple[int, int, int]]:
    """Kernel (mangled) -> registers, bytes spilt, bytes of stack, from what ptxas -v says."""
    found = {}
    for name, rest in re.findall(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", messages, re.DOTALL):
        registers = int(re.search(r"Used (\d+) registers", rest)[1])
        spilt = max(int(n) for n in re.findall(r"(\d+) bytes spill", rest))
        found[name] = registers, spilt, int(re.search(r"(\d+) bytes stack frame", rest)[1])
    return found


FAST = [("skinny.cu", "90a"), ("wgmma.cu", "90a")]
ALL = [(source, name) for name in ("80", "86", "89", "90a", "100a", "120") for source in KERNELS]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "architecture"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in ALL],
)
def test_kernels_compile_without_spilling(source, architecture):
    messages, _ = compiled(source, architecture)
    kernels = resources_of(messages)
    assert kernels
    for name, (registers, spilt, stack) in kernels.items():
        short = max((key for key in REGISTERS if f"{len(key)}{key}" in name), key=len)
        assert registers <= REGISTERS[short], (name, registers)
        assert (spilt, stack) == (0, 0), (name, spilt, stack)
    assert "warning" not in messages.lower(), messages
    assert "serialized" not in messages, messages  # ptxas on wgmma whose accumulators it has to move


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_as_cpp20(source):
    assert resources_of(compiled(source, "90a", "c++20")[0])


def cuobjdump() -> str | None:
    """The toolkit's, or the one of the package nvidia-cuda-cuobjdump, which has nvdisasm beside it, or of triton."""
    inside = [folder / "nvidia" / "cu13" / "bin" for folder in map(Path, sys.path)]
    inside += [folder / "triton" / "backends" / "nvidia" / "bin" for folder in map(Path, sys.path)]
    places = [os.environ.get("PATH", ""), f"{CUDA_HOME}/bin", *map(str, inside)]
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def machine_code(binary: Path) -> str:
    """The SASS in an object."""
    tool = Path(str(cuobjdump()))
    environment = {**os.environ, "PATH": f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"}  # for nvdisasm
    command = [str(tool), "-sass", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="needs cuobjdump (pip install nvidia-cuda-cuobjdump)")
@pytest.mark.parametrize(
    ("source", "architecture", "opcodes"),
    [
        ("wgmma.cu", "90a", {"IGMMA", "HMMA", "UTMALDG"}),
        ("skinny.cu", "90a", {"IMMA", "LDGSTS"}),
        pytest.param("gemm.cu", "80", {"IMMA", "HMMA", "LDSM", "LDGSTS"}, marks=pytest.mark.slow),
        pytest.param("gemm.cu", "89", {"IMMA", "HMMA", "LDSM", "LDGSTS"}, marks=pytest.mark.slow),
        pytest.param("gemm.cu", "120", {"IMMA", "HMMA", "LDSM", "LDGSTS"}, marks=pytest.mark.slow),
    ],
)
def test_machine_code_uses_tensor_cores_and_asynchronous_copies(source, architecture, opcodes):
    _, target = compiled(source, architecture)
    found = set(re.findall(r"\b([A-Z][A-Z0-9]+)\b", machine_code(target)))
    assert opcodes <= found
    assert not {"LDL", "STL"} & found  # local memory: spills


class TestArchitectures:
    def test_of_the_gpus_at_hand(self, monkeypatch):
        monkeypatch.delenv("INT8COMPILE_CUDA_ARCHS", raising=False)
        gpus = [(8, 0), (9, 0), (12, 0), (9, 0)]
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
        assert nvidia.architectures() == ("80", "90a", "120")
        flags = nvidia.nvcc_flags(nvidia.architectures())
        assert "-gencode=arch=compute_90a,code=sm_90a" in flags
        assert "-DINT8COMPILE_SM90A" in flags
        assert providers.wanted() == ["cpu", "common", "cuda"]
        gpus[1] = (7, 5)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
        with pytest.raises(KernelBuildError, match=r"8\.0 or later, and GPU 1 \(Tesla T4\) has 7\.5"):
            nvidia.architectures()
        assert providers.wanted() == ["cpu", "common"]

    def test_asked_for(self, monkeypatch):
        monkeypatch.setenv("INT8COMPILE_CUDA_ARCHS", "80; 90, 100a")
        assert nvidia.architectures() == ("80", "90a", "100a")
        for bad in ("75", "sm_90", "9.0"):
            monkeypatch.setenv("INT8COMPILE_CUDA_ARCHS", bad)
            with pytest.raises(KernelBuildError, match=f"INT8COMPILE_CUDA_ARCHS names '{bad}'; expected"):
                nvidia.architectures()

    def test_other_architectures_are_another_library(self, monkeypatch):
        monkeypatch.setenv("INT8COMPILE_CUDA_ARCHS", "80")
        first = loader.binary_path("cuda")
        monkeypatch.setenv("INT8COMPILE_CUDA_ARCHS", "90a")
        assert loader.binary_path("cuda") != first


class TestFallback:
    @pytest.fixture
    def gpu_tensor(self, monkeypatch, tmp_path):
        """Stands for a CUDA tensor; with the caches of this test alone."""
        monkeypatch.setenv("INT8COMPILE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(loader, "load", lambda name: loader.build(name))
        notices.warn_once.cache_clear()

        class Device:
            type = "cuda"

        class Gpu(torch.Tensor):
            device = Device()

        return torch.ones(1).as_subclass(Gpu)

    def test_no_gpu(self, gpu_tensor, monkeypatch, caplog):
        monkeypatch.delenv("INT8COMPILE_CUDA_ARCHS", raising=False)
        with pytest.raises(KernelBuildError, match="torch sees no CUDA GPU"):
            providers.choose_provider("native", [gpu_tensor])
        assert providers.choose_provider("auto", [gpu_tensor, torch.ones(1)]).name == "reference (cpu, cuda)"
        assert providers.choose_provider("reference", [gpu_tensor]).native is False

    def test_no_nvcc_is_named_and_falls_back_once(self, gpu_tensor, monkeypatch, caplog):
        monkeypatch.setenv("INT8COMPILE_CUDA_ARCHS", "80")
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        with pytest.raises(
            KernelBuildError, match=r"nvcc was not found \(install the CUDA toolkit, or set CUDA_HOME\)"
        ):
            providers.choose_provider("native", [gpu_tensor])
        for _ in range(2):
            assert providers.choose_provider("auto", [gpu_tensor]) == providers.Provider(
                "reference (cuda)", native=False
            )
        (record,) = [r for r in caplog.records if r.name == "int8compile.native"]
        assert "nvcc was not found" in record.message
        assert "reference operators are used instead" in record.message


class TestWgmmaProof:
    @pytest.fixture
    def hopper(self, monkeypatch, tmp_path):
        """A machine with one H200, a library in a folder, and what became of wgmma."""
        chosen: list[bool] = []
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "NVIDIA H200")
        monkeypatch.setattr(torch.ops, "int8compile_native", type("Ops", (), {"enable_wgmma": chosen.append}))
        notices.warn_once.cache_clear()
        return tmp_path / "int8compile_cuda.so", chosen

    def test_what_fails_is_not_used_and_not_tried_again(self, hopper, monkeypatch, caplog):
        library, chosen = hopper
        loader._enable_wgmma(library)  # there is no such library, so its process fails
        assert not chosen
        assert "the wgmma kernels are not used: their proof failed" in caplog.text
        monkeypatch.setattr(wgmma, "_failed_proof", lambda *args: pytest.fail("was tried again"))
        loader._enable_wgmma(library)
        assert not chosen

    def test_a_proof_in_which_the_process_is_killed_has_failed(self, hopper, monkeypatch, caplog):
        library, chosen = hopper

        def killed(library, device):
            texts = {path.name: path.read_text() for path in library.parent.glob("wgmma-*")}
            raise SystemExit(repr(texts))  # as far as it got

        monkeypatch.setattr(wgmma, "_failed_proof", killed)
        with pytest.raises(SystemExit, match="'wgmma-NVIDIA-H200': 'their proof did not end'"):
            loader._enable_wgmma(library)
        (library.parent / "wgmma-NVIDIA-H200").write_text("their proof did not end")
        loader._enable_wgmma(library)
        assert not chosen
        assert "the wgmma kernels are not used: their proof did not end (delete" in caplog.text

    def test_a_proof_that_was_interrupted_is_tried_again(self, hopper, monkeypatch):
        library, chosen = hopper
        monkeypatch.setattr(wgmma, "_failed_proof", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loader._enable_wgmma(library)
        monkeypatch.setattr(wgmma, "_failed_proof", lambda *args: "")
        loader._enable_wgmma(library)
        assert chosen == [True]

    def test_what_is_proven_is_used(self, hopper, monkeypatch):
        library, chosen = hopper
        monkeypatch.setattr(wgmma, "_failed_proof", lambda *args: "")
        loader._enable_wgmma(library)
        monkeypatch.setattr(wgmma, "_failed_proof", lambda *args: pytest.fail("was tried again"))
        loader._enable_wgmma(library)
        assert chosen == [True, True]

    @pytest.mark.parametrize("kind", ["empty", "others may write", "a link", "a folder"])
    def test_a_verdict_that_is_cut_or_planted_is_none(self, hopper, monkeypatch, kind):
        library, chosen = hopper
        verdict = library.parent / "wgmma-NVIDIA-H200"
        if kind == "a folder":
            verdict.mkdir()
        elif kind == "a link":
            verdict.with_name("elsewhere").write_text("proven")
            verdict.symlink_to("elsewhere")
        else:
            verdict.write_text("" if kind == "empty" else "proven")
            verdict.chmod(0o666 if kind == "others may write" else 0o644)
        proof = mock.Mock(return_value="it is wrong")
        monkeypatch.setattr(wgmma, "_failed_proof", proof)
        loader._enable_wgmma(library)
        proof.assert_called_once()
        assert not chosen
        assert kind == "a folder" or verdict.read_text() == "it is wrong"
        assert verdict.is_dir() or verdict.stat().st_mode & 0o022 == 0

    def test_a_verdict_that_cannot_be_kept_is_found_again(self, hopper, monkeypatch):
        library, chosen = hopper
        monkeypatch.setattr(wgmma, "_failed_proof", lambda *args: "")
        monkeypatch.setattr(tempfile, "mkdtemp", mock.Mock(side_effect=OSError(30, "read-only")))
        monkeypatch.setattr(wgmma.kernel_cache.filelock, "FileLock", mock.Mock(side_effect=OSError(30, "read-only")))
        loader._enable_wgmma(library)
        assert chosen == [True]
        assert not list(library.parent.iterdir())


LOAD = """
    import torch
    from torch.utils import cpp_extension
    cpp_extension.CUDA_HOME = {cuda!r}  # a CPU-only torch ignores the variable
    from int8compile.native import loader, providers
    loader.load("cuda")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in ("linear", "quantize_rowwise", "scaled_mm", "input_gradient"):
        assert has("int8compile::" + op, "CUDA"), op
        assert has("int8compile::" + op, "AutogradCUDA") == (op != "input_gradient"), op  # whose gradient is Python's
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():  # through AutogradCUDA; a graph for backward would ask for the device
        x, codes = torch.empty(2, 16, device="cuda"), torch.empty(8, 16, device="cuda").char()
        out = torch.ops.int8compile.linear(x, codes, torch.empty(8, device="cuda"), None, 6.0)
    assert (tuple(out.shape), out.device.type) == ((2, 8), "cuda")
    kernel = torch.ops.int8compile_native.cuda_kernel
    torch.ops.int8compile_native.enable_wgmma(True)
    for sizes in {sizes!r}:
        print(kernel(*sizes))
"""
ALONE = """
    import sys, torch
    torch.ops.load_library(sys.argv[1])
    assert "int8compile" not in sys.modules
    for name in sys.argv[2:]:
        print(getattr(torch.ops.int8compile, name).default._schema)
"""
# (M, N, K), capability, multiprocessors, whether x comes quantised -> kernel
TABLE = [
    ((1, 4096, 4096, 90, 132, False), "fused"),
    ((1, 4096, 4096, 90, 132, True), "skinny"),
    ((4, 14336, 4096, 90, 132, False), "fused"),
    ((8, 14336, 4096, 90, 132, False), "skinny"),
    ((9, 4096, 4096, 90, 132, False), "t16x64 / 5"),
    ((64, 4096, 4096, 90, 132, False), "t64x64 / 5"),
    ((64, 28672, 8192, 90, 132, False), "t64x64"),
    ((100, 4096, 4096, 90, 132, False), "t64x64"),
    ((512, 4096, 4096, 90, 132, False), "wgmma128"),
    ((512, 14336, 4096, 90, 132, False), "wgmma256"),
    ((4096, 4096, 4096, 90, 132, False), "wgmma256"),
    ((4096, 4096, 4096, 80, 108, False), "t128x128"),
    ((4096, 4095, 4095, 90, 132, False), "unaligned"),
]


@needs_nvcc
@pytest.mark.slow  # compiles everything, for one architecture
def test_the_library_builds_loads_and_registers_without_a_gpu(tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("torch_cuda", "c10_cuda"):  # a CPU-only torch has none to link with; nothing of theirs is used
        if not (Path(cpp_extension.TORCH_LIB_PATH) / f"lib{name}.so").exists():
            subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", stubs / f"lib{name}.so"], check=True)
    cuda = str(CUDA_HOME)
    script = LOAD.format(cuda=cuda, sizes=[sizes for sizes, _ in TABLE])
    environment = {
        **os.environ,
        "INT8COMPILE_CACHE_DIR": str(tmp_path / "cache"),
        "INT8COMPILE_CUDA_ARCHS": "90a",
        "LIBRARY_PATH": str(stubs),
        "LD_LIBRARY_PATH": f"{stubs}:{cuda}/lib64",
    }

    def run(code: str, *arguments: str) -> tuple[list[str], str]:
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), done.stderr

    for _ in range(2):  # the second time out of the cache
        lines, messages = run(script)
        assert lines == [name for _, name in TABLE]
    assert "compiling" not in messages
    # Where no Python has defined the operators, the library does, and in the same words.
    (library,) = (tmp_path / "cache").glob("*/int8compile_cuda.so")
    ops = [op for op in REFERENCES if op._schema.name.split("::")[1] not in ("master_linear", "quantize_weight")]
    schemas, _ = run(ALONE, str(library), *(op._schema.name.split("::")[1] for op in ops))
    assert schemas == [str(op._schema) for op in ops]
