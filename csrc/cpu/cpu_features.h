// What this CPU and its operating system let a program use.

#pragma once

#include <cstdint>

namespace int8compile {

struct CpuFeatures {
  bool avx2 = false;  // with FMA and F16C
  bool avxvnni = false;  // int8 dot products on AVX2's registers
  bool avx512vnni = false;  // with F, BW and VL
  bool avx512bf16 = false;  // bfloat16 dot products, besides avx512vnni
  bool amx_int8 = false;  // besides avx512vnni; the operating system has given its leave
};

const CpuFeatures& cpu_features();

// What it says of itself: words of CPUID, named by leaf and register, and the registers that the operating system saves
// (XGETBV). Tests answer for CPUs that they do not run on.
struct CpuWords {
  uint32_t leaf1_c = 0, leaf7_b = 0, leaf7_c = 0, leaf7_d = 0, leaf7_1_a = 0;
  uint64_t saved = 0;
};

// `may_use_tiles` asks the operating system, where all else is there.
CpuFeatures features_of(const CpuWords& words, bool (*may_use_tiles)());

}  // namespace int8compile
