// What this CPU and its operating system let a program use.

#pragma once

namespace int8compile {

struct CpuFeatures {
  bool avx2 = false;  // with FMA and F16C
  bool avx512vnni = false;  // with F, BW and VL
  bool amx_int8 = false;  // the CPU has it; using it takes the operating system's leave besides (arch_prctl)
};

const CpuFeatures& cpu_features();

}  // namespace int8compile
