"""csrc/cpu's files as they are, on this CPU, with AddressSanitizer and UndefinedBehaviorSanitizer, in one process.

Every provider that the CPU has, over the extremes of the operators: each array is an allocation of its own that ends
where the data does, so a byte read or written behind it ends the program. What this CPU has not is checked emulated
(``test_emulated_isa.py``), with the same program.
"""

from pathlib import Path

import pytest
import torch
from kernel_programs import Mistake, Recipe, link, run

from int8compile.native import loader

NATIVE = Recipe(
    flags=("-O1", "-Wno-error"),  # GCC warns of its own <immintrin.h>
    names=(
        "amx", "avx512vnni", "avxvnni", "avx2", "portable", "plan", "product", "weight_only", "providers",
        "selfcheck", "cpu_features", "attention", "attention_check", "attention_portable", "attention_avx2",
        "attention_avx512", "attention_avx512bf16",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    return NATIVE.compile_objects(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def program(objects, tmp_path_factory) -> Path:
    return link(objects, tmp_path_factory.mktemp("program") / "check")


def test_every_provider_of_this_cpu_stays_within_its_memory_and_is_right(program):
    done = run(program, "here")
    assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
    names, last = done.stdout.splitlines()
    assert last == "right"
    loader.load("cpu")
    assert names == torch.ops.int8compile_native.isas()


def test_features_of_cpus_that_have_an_instruction_set_and_that_have_not(program):
    done = run(program, "features")
    assert (done.returncode, done.stdout) == (0, "right\n"), (done.stdout, done.stderr)


OVERFLOW = "heap-buffer-overflow"
FAST = [  # of a header's several users, the one compiled is tried: the portable provider, which every CPU has
    Mistake("quantize.h", "v.take_outliers(limit) & lanes", "v.take_outliers(limit)", "portable", "here", OVERFLOW),
    Mistake("finish.h", "strip.cols * sizeof(Out)", "kStrip * sizeof(Out)", "portable", "here", OVERFLOW),
]
SLOW = [
    Mistake(
        "float_product.h",
        "features < piece.count ? features : piece.count",
        "piece.count",
        "portable",
        "here",
        OVERFLOW,
    ),
    Mistake("quantize.h", "codes + at, last, k - at", "codes + at, last, Vec::width", "portable", "here", OVERFLOW),
    Mistake("quantize.h", "if (k > 0) {", "if (true) {", "portable", "here", "null pointer passed"),
    Mistake("quantize.h", "(1u << (k - at)) - 1", "(2u << (k - at)) - 1", "portable", "here", OVERFLOW),
    Mistake("quantize.h", "covered[i] = -(", "covered[i] = (", "portable", "here", "wrong: "),
    Mistake("widened.h", "? kNone : here - kChunk", "? kNone : here / kChunk * kChunk", "portable", "here", OVERFLOW),
    Mistake(
        "product.cpp",
        "residual(x.rows * outliers",
        "residual((x.rows - 1) * outliers",
        "product",
        "here",
        "AddressSanitizer",
    ),
    Mistake("cpu_features.cpp", "found.avx2 && zmm", "found.avx2", "cpu_features", "features", "wrong: tiles are"),
    Mistake("product.cpp", "codes(x.rows * x.k)", "codes(x.rows * x.k / 2)", "product", "here", OVERFLOW),
    Mistake("product.cpp", "gathered(outliers.count * kStrip)", "gathered(kStrip)", "product", "here", OVERFLOW),
]


@pytest.mark.parametrize("mistake", [*FAST, *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in SLOW)])
def test_planted_mistakes_are_found(mistake, objects, tmp_path):
    done = run(NATIVE.with_mistake(mistake, objects, tmp_path), mistake.check)
    assert done.returncode != 0
    assert mistake.complaint in done.stdout + done.stderr
