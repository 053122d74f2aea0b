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

#include "vec_avx2.h"
#include "attention_block.h"

namespace int8compile {
namespace {

struct Avx2Form : Widened<Avx2Vec> {
  static constexpr int rows = 6, vecs = 2;

  // 8 x 8 words.
  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    __m256 half[8];  // lane i of each half of half[j]: row j and j + 4
    INT8COMPILE_UNROLL
    for (int j = 0; j < 4; ++j) {
      for (int right = 0; right < 2; ++right) {
        const auto piece = [&](int64_t row) {
          return _mm_loadu_ps(
              reinterpret_cast<const float*>(static_cast<const char*>(from) + row * from_stride) + 4 * right);
        };
        half[j + 4 * right] = _mm256_insertf128_ps(_mm256_castps128_ps256(piece(j)), piece(j + 4), 1);
      }
    }
    INT8COMPILE_UNROLL
    for (int right = 0; right < 8; right += 4) {
      const __m256 low01 = _mm256_unpacklo_ps(half[right], half[right + 1]);
      const __m256 low23 = _mm256_unpacklo_ps(half[right + 2], half[right + 3]);
      const __m256 high01 = _mm256_unpackhi_ps(half[right], half[right + 1]);
      const __m256 high23 = _mm256_unpackhi_ps(half[right + 2], half[right + 3]);
      const auto put = [&](int64_t row, __m256 values) {
        _mm256_storeu_ps(reinterpret_cast<float*>(static_cast<char*>(to) + row * to_stride), values);
      };
      put(right, _mm256_shuffle_ps(low01, low23, 0x44));
      put(right + 1, _mm256_shuffle_ps(low01, low23, 0xee));
      put(right + 2, _mm256_shuffle_ps(high01, high23, 0x44));
      put(right + 3, _mm256_shuffle_ps(high01, high23, 0xee));
    }
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
