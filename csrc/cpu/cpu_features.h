// What this CPU and its operating system let a program use.

#pragma once

namespace int8compile {

struct CpuFeatures {
  bool avx2 = false;  // with FMA and F16C
  bool avxvnni = false;  // int8 dot products on AVX2's registers
  bool avx512vnni = false;  // with F, BW and VL
  bool amx_int8 = false;  // besides avx512vnni; the operating system has given its leave
};

const CpuFeatures& cpu_features();

}  // namespace int8compile
