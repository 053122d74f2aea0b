// Attention with AVX2 and FMA. See attention_block.h.
//
// Of 16 registers 12 are accumulators, 6 rows by 2 vectors of 8 floats.

#include "attention.h"
#include "target.h"

#if INT8COMPILE_X86 && !defined(INT8COMPILE_EMULATED_ISA)

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx2,fma,f16c")

#include "transpose_avx2.h"
#include "vec_avx2.h"
#include "attention_block.h"

namespace int8compile {
namespace {

struct Avx2Form : Widened<Avx2Vec> {
  static constexpr int rows = 6, vecs = 2;

  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    int8compile::transpose(from, from_stride, to, to_stride);
  }
};

constexpr AttentionKernels kAvx2 = attention_of<Avx2Form>("avx2");

}  // namespace

INT8COMPILE_TARGET_END

const AttentionKernels* avx2_attention() {
  return &kAvx2;
}

}  // namespace int8compile

#else

const int8compile::AttentionKernels* int8compile::avx2_attention() {
  return nullptr;
}

#endif
