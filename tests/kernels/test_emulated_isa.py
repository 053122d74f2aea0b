"""csrc/cpu's files for AVX512, VNNI and AMX, on an emulated CPU: exact about what the instructions compute and refuse.

They are compiled with ``emulated_isa/immintrin.h`` in place of the compiler's own, with sanitizers, and run against the
portable provider and plain loops. What this cannot show is speed, and what a compiler makes of the real intrinsics:
``test_cpu_kernels.py`` runs every instruction set that the CPU has.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from checkout import HELPERS
from kernel_programs import Mistake, Recipe, link, run

#: The rest of csrc/cpu needs torch, or AVX2. What is not on trial here is compiled plain.
EMULATED = Recipe(
    flags=("-Og", "-DINT8COMPILE_EMULATED_ISA", f"-I{HELPERS / 'emulated_isa'}"),
    names=(
        "amx", "avx512vnni", "avxvnni", "plan", "product", "weight_only", "portable", "providers", "selfcheck",
        "cpu_features", "attention", "attention_check", "attention_portable", "attention_avx2", "attention_avx512",
        "attention_avx512bf16",
    ),
    plain=("plan", "portable", "providers", "selfcheck", "cpu_features", "attention_check", "attention_portable"),
)  # fmt: skip


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> list[Path]:
    return EMULATED.compile_objects(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def program(objects, tmp_path_factory) -> Path:
    return link(objects, tmp_path_factory.mktemp("program") / "check")


ISAS = ("portable", "avxvnni", "avx512vnni", "amx")


def test_providers_compute_what_the_portable_one_does(program):
    checks = [("kernels", isa) for isa in reversed(ISAS)] + [("product", isa) for isa in ISAS] + [("selfcheck",)]
    checks += [("attention", name) for name in ("avx512", "avx512bf16", "portable")]
    with ThreadPoolExecutor(2) as pool:
        for check, done in zip(checks, pool.map(lambda words: run(program, *words), checks), strict=True):
            assert (done.returncode, done.stdout) == (0, "right\n"), (check, done.stdout, done.stderr)


FAST = [
    Mistake("amx.cpp", "_tile_dpbssd(3, 5, 6)", "_tile_dpbssd(3, 4, 6)", "amx", "kernels amx", "wrong: multiply"),
    Mistake("amx.cpp", "i < 6 ? cols", "i > 3 && i < 6 ? cols", "amx", "kernels amx", "#UD: tdpbssd: rows of"),
    Mistake("product.cpp", "packed ? kPackRows", "packed ? 8", "product", "product amx", "heap-buffer-overflow"),
]
SLOW = [
    Mistake(
        "float_product.h",
        "piece.first ? Vec::all",
        "true ? Vec::all",
        "avx512vnni",
        "kernels avx512vnni",
        "wrong: float_product",
    ),
    Mistake("amx.cpp", "block.k - kFragment;", "i * kFragment;", "amx", "kernels amx", "heap-buffer-overflow"),
    Mistake("vnni.h", "* -128u", "* -127u", "avxvnni", "kernels avxvnni", "wrong: multiply"),
    Mistake("amx.cpp", "  configure(kTile);\n}", "}", "amx", "kernels amx", "#UD: a tile is used before ldtilecfg"),
    Mistake("amx.cpp", "  _tile_release();", "", "amx", "kernels amx", "the tiles are not released"),
    Mistake("amx.cpp", "configure(cols % kTile)", "configure(kTile)", "amx", "kernels amx", "heap-buffer-overflow"),
    Mistake("amx.cpp", "config.palette = 1;", "config.palette = 2;", "amx", "kernels amx", "no such palette"),
    Mistake("amx.cpp", "row_bytes[i] = kFragment", "row_bytes[i] = 65", "amx", "kernels amx", "up to 64 bytes"),
    Mistake("amx.cpp", "(row + 1) * kFragment - count", "row * kFragment", "amx", "kernels amx", "wrong: multiply"),
    Mistake("amx.cpp", "if (block.begin == 0)", "if (true)", "amx", "kernels amx", "wrong: multiply"),
    Mistake("amx.cpp", "&kPacking, kFragment}", "&kPacking, 1}", "amx", "kernels amx", "AddressSanitizer"),
    Mistake("plan.cpp", "table->use == &use", "true", "plan", "kernels amx", "another provider takes the tuned table"),
    Mistake("plan.cpp", "|| at->key != key", "", "plan", "kernels amx", "wrong: tuned: 16 x 576 x 1536 takes"),
    Mistake("plan.cpp", "sizes.rows >= 5 && sizes.k >= 64", "sizes.rows >= 5", "plan", "kernels amx", "amx takes amx"),
    Mistake("transpose.h", "0x0f00", "0x00f0", "amx", "kernels amx", "wrong: multiply"),
    Mistake("transpose.h", "if (row < rows)", "if (true)", "amx", "kernels amx", "heap-buffer-overflow"),
    Mistake("attention_few.h", "key + i < o.keys ?", "true ?", "attention_avx512", "attention avx512", "overflow"),
    Mistake("attention_few.h", "* Vec::all(alpha[r])", "", "attention_avx512", "attention avx512", "wrong: attention"),
    Mistake("transpose_avx2.h", "piece(4 + j, at), 1)", "piece(j, at), 1)", "avxvnni", "kernels avxvnni", "wrong: mul"),
    Mistake("panel.h", "at == 0 ? start : nullptr", "start", "avxvnni", "kernels avxvnni", "wrong: multiply"),
    Mistake("panel.h", "k - at < depth ?", "true ?", "avx512vnni", "kernels avx512vnni", "AddressSanitizer"),
    Mistake("finish.h", "at * tile.outliers.count", "0", "avx512vnni", "kernels avx512vnni", "outputs differ"),
    Mistake("vnni.h", "at == 0 ? start : nullptr", "start", "avx512vnni", "kernels avx512vnni", "wrong: multiply"),
    Mistake("avx512vnni.cpp", "<< count) - 1", "<< (count | 63)) - 1", "avx512vnni", "kernels avx512vnni", "overflow"),
    Mistake(
        "quantize.h",
        "(limit) & lanes",
        "(limit) & (lanes | ~0u)",
        "avx512vnni",
        "kernels avx512vnni",
        "heap-buffer-overflow",
    ),
    Mistake("scan_avx512.h", "+ 0xffff", "+ 0", "avx512vnni", "kernels avx512vnni", "wrong: "),
    Mistake("scan_avx512.h", "lanes & reached", "reached", "avx512vnni", "kernels avx512vnni", "overflow"),
    Mistake("scan_avx512.h", "(k - at)) - 1", "(31)) - 1", "avx512vnni", "kernels avx512vnni", "overflow"),
    Mistake("vec_avx512.h", "(0x7fff)", "(0x8000)", "avx512vnni", "kernels avx512vnni", "wrong: "),
    Mistake("vec_avx512.h", "_CMP_GE_OQ", "_CMP_UNORD_Q", "avx512vnni", "kernels avx512vnni", "wrong: "),
    Mistake("vec_avx512.h", "(0x7fc0)", "(0x7f80)", "avx512vnni", "kernels avx512vnni", "wrong: residuals"),
]


@pytest.mark.parametrize("mistake", [*FAST, *(pytest.param(mistake, marks=pytest.mark.slow) for mistake in SLOW)])
def test_planted_mistakes_are_found(mistake, objects, tmp_path):
    done = run(EMULATED.with_mistake(mistake, objects, tmp_path), *mistake.check.split())
    assert done.returncode != 0
    assert mistake.complaint in done.stdout + done.stderr
