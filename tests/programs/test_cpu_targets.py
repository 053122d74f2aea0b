"""What packages can be compiled for, on CPUs that this machine need not be: each says what it has."""

import platform

import pytest
import torch

from int8compile import cpuinfo
from int8compile.errors import OptionValueError
from int8compile.programs import cpu_targets

V3 = "abm avx avx2 bmi1 bmi2 f16c fma movbe popcnt sse4_1 sse4_2 ssse3"
ZEN_5 = f"fpu sse2 ht {V3} avx512f avx512_vnni avx_vnni vaes gfni"
ZEN_3 = f"fpu sse2 ht {V3} vaes"
WESTMERE = "fpu sse2 ht popcnt sse4_1 sse4_2 ssse3"


@pytest.fixture
def x86(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


def says(monkeypatch, tmp_path, text: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    monkeypatch.setattr(cpuinfo, "CPUINFO", path)


@pytest.mark.parametrize(
    ("flags", "default", "vnni"), [(ZEN_5, "avx2", True), (ZEN_3, "avx2", False), (WESTMERE, "portable", False)]
)
def test_targets_are_what_the_cpu_has(monkeypatch, tmp_path, x86, flags, default, vnni):
    says(monkeypatch, tmp_path, f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    assert cpu_targets.cpu_target(None).name == default
    assert ("avx512_vnni" in cpu_targets.cpu_flags()) is vnni
    assert ("avx512_vnni" in cpu_targets.cpu_target("native").flags) is vnni
    assert cpu_targets.cpu_flags() <= set(flags.split()) - {"fpu", "sse2", "ht"}
    if default == "portable":
        with pytest.raises(OptionValueError, match="cpu_isa='avx2': expected one of native, portable"):
            cpu_targets.cpu_target("avx2")


def test_arm_has_its_own_words(monkeypatch, tmp_path):
    says(monkeypatch, tmp_path, "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert cpu_targets.cpu_flags() == {"asimd", "asimddp", "i8mm", "bf16", "sve"}
    assert cpu_targets.cpu_target(None).name == "native"


@pytest.mark.parametrize(
    ("capability", "default"),
    [("AVX512", "avx2"), ("AVX2", "avx2"), ("DEFAULT", "portable"), ("NO AVX", "portable")],
)
def test_where_the_system_does_not_say_torch_does(monkeypatch, tmp_path, x86, capability, default):
    monkeypatch.setattr(cpuinfo, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_targets.cpu_target(None).name == default
