// Attention with AVX512 F and BW, in float32. See attention_avx512.h and attention_block.h.

#include "attention.h"
#include "target.h"

#if INT8COMPILE_X86

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx512f,avx512bw,avx512vl")

#include "attention_avx512.h"
#include "attention_block.h"

namespace int8compile {
namespace {

constexpr AttentionKernels kAvx512 = attention_of<Avx512Form>("avx512");

}  // namespace

INT8COMPILE_TARGET_END

const AttentionKernels* avx512_attention() {
  return &kAvx512;
}

}  // namespace int8compile

#else

const int8compile::AttentionKernels* int8compile::avx512_attention() {
  return nullptr;
}

#endif
