"""csrc/cpu's files for AVX512, VNNI and AMX, on an emulated CPU: exact about what the instructions compute and refuse.

They are compiled with ``emulated_isa/immintrin.h`` in place of the compiler's own, with sanitizers, and run against the
portable provider and plain loops. What this cannot show is speed, and what a compiler makes of the real intrinsics:
``test_cpu_kernels.py`` runs every instruction set that the CPU has.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKS = ROOT / "tests" / "emulated_isa"
FLAGS = ["-std=c++17", "-Og", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-ffp-contract=off"]
FLAGS += ["-DINT8COMPILE_EMULATED_ISA", f"-I{CHECKS}"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all"]
#: What is on trial, and what it is tried with. The rest of csrc/cpu needs torch, or AVX2.
TRIED = ("amx", "avx512vnni", "avxvnni", "product")
OTHERS = ("portable", "providers", "selfcheck", "cpu_features")


def run(*command: object) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # which needs ptrace
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment, timeout=600)


def compile_object(source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    sanitizers = [] if source.stem in OTHERS else SANITIZERS
    made = run(os.environ.get("CXX", "c++"), *FLAGS, *sanitizers, "-c", source, "-o", target)
    assert made.returncode == 0, made.stderr
    return target


def link(objects: list[Path], target: Path) -> Path:
    made = run(os.environ.get("CXX", "c++"), *SANITIZERS, "-pthread", *objects, "-o", target)
    assert made.returncode == 0, made.stderr
    return target


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("emulated")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in TRIED + OTHERS] + sorted(CHECKS.glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: compile_object(source, folder), sources))


@pytest.fixture(scope="module")
def program(objects, tmp_path_factory) -> Path:
    return link(objects, tmp_path_factory.mktemp("program") / "check")


ISAS = ("portable", "avxvnni", "avx512vnni", "amx")


def test_providers_compute_what_the_portable_one_does(program):
    checks = [("kernels", isa) for isa in reversed(ISAS)] + [("product", isa) for isa in ISAS] + [("selfcheck",)]
    with ThreadPoolExecutor(2) as pool:
        for check, done in zip(checks, pool.map(lambda words: run(program, *words), checks), strict=True):
            assert (done.returncode, done.stdout) == (0, "right\n"), (check, done.stdout, done.stderr)


class Mutant(NamedTuple):
    """A mistake planted in a file, which makes the check say `complaint`."""

    file: str  # that has `old`
    old: str
    new: str
    source: str  # that is compiled
    check: str
    complaint: str


FAST = [
    Mutant("amx.cpp", "_tile_dpbssd(3, 5, 6)", "_tile_dpbssd(3, 4, 6)", "amx", "kernels amx", "wrong: multiply"),
    Mutant("amx.cpp", "i < 6 ? cols", "i > 3 && i < 6 ? cols", "amx", "kernels amx", "#UD: tdpbssd: rows of"),
    Mutant("product.cpp", "? 1 : kPackRows,", "? 1 : 8,", "product", "product amx", "heap-buffer-overflow"),
]
SLOW = [
    Mutant("amx.cpp", "block.k - kFragment;", "i * kFragment;", "amx", "kernels amx", "heap-buffer-overflow"),
    Mutant("vnni.h", "* -128u", "* -127u", "avxvnni", "kernels avxvnni", "wrong: multiply"),
    Mutant("amx.cpp", "  configure(kTile);\n}", "}", "amx", "kernels amx", "#UD: a tile is used before ldtilecfg"),
    Mutant("amx.cpp", "  _tile_release();", "", "amx", "kernels amx", "the tiles are not released"),
    Mutant("amx.cpp", "configure(cols % kTile)", "configure(kTile)", "amx", "kernels amx", "heap-buffer-overflow"),
    Mutant("amx.cpp", "config.palette = 1;", "config.palette = 2;", "amx", "kernels amx", "no such palette"),
    Mutant("amx.cpp", "row_bytes[i] = kFragment", "row_bytes[i] = 65", "amx", "kernels amx", "up to 64 bytes"),
    Mutant("amx.cpp", "(row + 1) * kFragment - count", "row * kFragment", "amx", "kernels amx", "wrong: multiply"),
    Mutant("amx.cpp", "if (block.begin == 0)", "if (true)", "amx", "kernels amx", "wrong: multiply"),
    Mutant("transpose.h", "0x0f00", "0x00f0", "amx", "kernels amx", "wrong: multiply"),
    Mutant("transpose.h", "if (row < rows)", "if (true)", "amx", "kernels amx", "heap-buffer-overflow"),
    Mutant("vnni.h", "at == 0 ? start : nullptr", "start", "avx512vnni", "kernels avx512vnni", "wrong: multiply"),
    Mutant("avx512vnni.cpp", "<< count) - 1", "<< (count | 63)) - 1", "avx512vnni", "kernels avx512vnni", "overflow"),
    Mutant("vec_avx512.h", "(0x7fff)", "(0x8000)", "avx512vnni", "kernels avx512vnni", "wrong: "),
    Mutant("vec_avx512.h", "_CMP_GE_OQ", "_CMP_UNORD_Q", "avx512vnni", "kernels avx512vnni", "wrong: "),
    Mutant("vec_avx512.h", "(0x7fc0)", "(0x7f80)", "avx512vnni", "kernels avx512vnni", "wrong: residuals"),
]


@pytest.mark.parametrize("mutant", [*FAST, *(pytest.param(mutant, marks=pytest.mark.slow) for mutant in SLOW)])
def test_planted_mistakes_are_found(mutant, objects, tmp_path):
    sources = tmp_path / "cpu"
    shutil.copytree(ROOT / "csrc" / "cpu", sources)
    text = (sources / mutant.file).read_text()
    assert text.count(mutant.old) == 1
    (sources / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    changed = compile_object(sources / f"{mutant.source}.cpp", tmp_path)
    rest = [o for o in objects if o.stem != mutant.source]
    done = run(link([changed, *rest], tmp_path / "check"), *mutant.check.split())
    assert done.returncode != 0
    assert mutant.complaint in done.stdout + done.stderr
