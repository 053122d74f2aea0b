// CPUID for the instructions, XGETBV for the registers the operating system saves; tiles, which are large, Linux saves
// for processes that have asked it to. (Running an instruction to see
// whether it raises, or asking a library that can be told to pretend, gives wrong answers.)

#include "cpu_features.h"

#if defined(__x86_64__)

#include <cpuid.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Registers {
  uint32_t a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(uint32_t leaf, uint32_t part) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.a, &r.b, &r.c, &r.d);
  return r;
}

uint64_t saved_registers() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Asks for tiles, for all threads of the process; false where the kernel is too old or refuses.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
  return false;
#endif
}

int8compile::CpuFeatures detect() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0);
  int8compile::CpuWords words;
  words.leaf1_c = basic.c;
  words.leaf7_b = extended.b;
  words.leaf7_c = extended.c;
  words.leaf7_d = extended.d;
  words.leaf7_1_a = extended.a >= 1 ? cpuid(7, 1).a : 0;
  const bool osxsave = (basic.c >> 27 & 1) != 0;
  words.saved = osxsave ? saved_registers() : 0;
  return int8compile::features_of(words, may_use_tiles);
}

}  // namespace

#else

namespace {

int8compile::CpuFeatures detect() {
  return {};
}

}  // namespace

#endif

int8compile::CpuFeatures int8compile::features_of(const CpuWords& words, bool (*may_use_tiles)()) {
  const auto bit = [](uint32_t word, int at) { return (word >> at & 1) != 0; };
  const auto saved = [&](uint64_t registers) { return (words.saved & registers) == registers; };
  const bool ymm = saved(0x6), zmm = saved(0xe6), tiles = saved(0x60000);
  CpuFeatures found;
  found.avx2 =
      ymm && bit(words.leaf1_c, 12) && bit(words.leaf1_c, 28) && bit(words.leaf1_c, 29) && bit(words.leaf7_b, 5);
  found.avxvnni = found.avx2 && bit(words.leaf7_1_a, 4);
  found.avx512vnni = found.avx2 && zmm && bit(words.leaf7_b, 16) && bit(words.leaf7_b, 30) && bit(words.leaf7_b, 31) &&
      bit(words.leaf7_c, 11);
  found.avx512bf16 = found.avx512vnni && bit(words.leaf7_1_a, 5);
  found.amx_int8 = found.avx512vnni && tiles && bit(words.leaf7_d, 24) && bit(words.leaf7_d, 25) && may_use_tiles();
  return found;
}

const int8compile::CpuFeatures& int8compile::cpu_features() {
  static const CpuFeatures found = detect();
  return found;
}
