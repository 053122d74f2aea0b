// Attention with AVX512 F and BW, in float32. See attention_block.h.
//
// Of 32 registers 24 are accumulators, 6 rows by 4 vectors of 16 floats.

#include "attention.h"
#include "target.h"

#if INT8COMPILE_X86

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx512f,avx512bw,avx512vl")

#include "vec_avx512.h"
#include "attention_block.h"
#include "transpose.h"

namespace int8compile {
namespace {

struct Avx512Form : Widened<Avx512Vec> {
  static constexpr int rows = 6, vecs = 4;

  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    int8compile::transpose(from, from_stride, to, to_stride);
  }
};

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
