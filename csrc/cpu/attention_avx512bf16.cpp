// Attention of bfloat16 tensors with AVX512's dot products of pairs (vdpbf16ps). See attention_block.h.
//
// Weights are rounded to bfloat16, as PyTorch rounds them for its own product; their sum is that of the floats. Few rows,
// for which nothing is packed, are multiplied as floats.

#include "attention.h"
#include "target.h"

#if INT8COMPILE_X86_2021

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx512f,avx512bw,avx512vl,avx512bf16")

#include "attention_avx512.h"
#include "attention_block.h"

namespace int8compile {
namespace {

struct Pairs {
  using Vec = Avx512Vec;
  using Element = BF16;
  static constexpr int64_t pair = 2;
  static constexpr int rows = 6, vecs = 4;

  static bool takes(Float type) {
    return type == Float::bf16;
  }

  // A register of pairs, which holds no floats.
  static INT8COMPILE_INLINE Vec load(const BF16* from) {
    return {_mm512_loadu_ps(from)};
  }

  // In assembly because compilers, given the intrinsic, copy accumulators from register to register.
  static INT8COMPILE_INLINE void add_product(Vec& sum, const BF16* left, Vec right) {
    int32_t both;
    std::memcpy(&both, left, sizeof(both));
    const __m512i pairs = _mm512_set1_epi32(both);
#if defined(INT8COMPILE_EMULATED_ISA)
    sum.v = _mm512_dpbf16_ps(sum.v, pairs, _mm512_castps_si512(right.v));
#else
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(pairs), "v"(right.v));
#endif
  }

  static INT8COMPILE_INLINE void store(Vec value, BF16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value.v));
  }

  // (Of other dtypes there are no rows here: takes().)
  template <class T>
  static void copy_row(const T* from, int64_t count, BF16* to) {
    const int64_t padded = round_up(count, pair * Vec::width);
    std::memcpy(to, from, count * sizeof(BF16));
    std::memset(to + count, 0, (padded - count) * sizeof(BF16));
  }

  static constexpr bool is_words(Float) {
    return true;
  }

  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    int8compile::transpose(from, from_stride, to, to_stride);
  }

  // Two rows of values, interleaved; zeros for those that are not there.
  template <class T>
  static void pack_values(const T* from, int64_t stride, int64_t keys, int64_t count, BF16* to) {
    for (int64_t at = 0; at < count; at += Vec::width) {
      const __m512i first = keys > 0 ? words(from + at, count - at) : _mm512_setzero_si512();
      const __m512i second = keys > 1 ? words(from + stride + at, count - at) : _mm512_setzero_si512();
      _mm512_storeu_si512(to + pair * at, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
  }

 private:
  template <class T>
  static __m512i words(const T* from, int64_t count) {
    T padded[Vec::width] = {};
    if (count < Vec::width) {
      std::memcpy(padded, from, count * sizeof(T));
      from = padded;
    }
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
};

constexpr AttentionKernels kAvx512Bf16 = attention_of<Pairs, Avx512Form>("avx512bf16");

}  // namespace

INT8COMPILE_TARGET_END

const AttentionKernels* avx512bf16_attention() {
  return &kAvx512Bf16;
}

}  // namespace int8compile

#else

const int8compile::AttentionKernels* int8compile::avx512bf16_attention() {
  return nullptr;
}

#endif
