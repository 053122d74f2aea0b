// Sixteen floats in a zmm register: what vec_avx2.h has for eight, with AVX512 F and BW.
//
// For files that compile under such a target; hence the anonymous namespace.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace int8compile {
namespace {

struct Avx512Vec {
  static constexpr int64_t width = 16;
  static constexpr int registers = 32;
  __m512 v;

  static Avx512Vec all(float value) {
    return {_mm512_set1_ps(value)};
  }

  static Avx512Vec load(const float* from) {
    return {_mm512_loadu_ps(from)};
  }

  static Avx512Vec load(const BF16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }

  static Avx512Vec load(const F16* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }

  static Avx512Vec load(const int32_t* from) {
    return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))};
  }

  static Avx512Vec load(const int8_t* from) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes))};
  }

  // Bytes from[0], from[stride], ... as floats. (A gather would read the three bytes behind each, too.)
  static Avx512Vec load_strided(const int8_t* from, int64_t stride) {
    const __m128i low = eight_bytes(from, stride), high = eight_bytes(from + 8 * stride, stride);
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpacklo_epi64(low, high)))};
  }

  void store(float* to) const {
    _mm512_storeu_ps(to, v);
  }

  void store(BF16* to) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i words = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(words));
  }

  void store(F16* to) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // Each rounded to the nearest integer, ties to even.
  void store_codes(int8_t* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v)));
  }

  Avx512Vec operator+(Avx512Vec o) const {
    return {_mm512_add_ps(v, o.v)};
  }

  Avx512Vec operator*(Avx512Vec o) const {
    return {_mm512_mul_ps(v, o.v)};
  }

  Avx512Vec plus_product(Avx512Vec a, Avx512Vec b) const {
    return {_mm512_fmadd_ps(a.v, b.v, v)};
  }

  // to [4] = the sum of the lanes of each.
  static void store_sums(Avx512Vec a, Avx512Vec b, Avx512Vec c, Avx512Vec d, float* to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
    const __m512 two = _mm512_add_ps(four, _mm512_shuffle_f32x4(four, four, 0x4e));
    const __m512 one = _mm512_add_ps(two, _mm512_shuffle_f32x4(two, two, 0xb1));
    _mm_storeu_ps(to, _mm512_castps512_ps128(one));
  }

  Avx512Vec operator-(Avx512Vec o) const {
    return {_mm512_sub_ps(v, o.v)};
  }

  // The larger or smaller of each; b's where either is NaN.
  static Avx512Vec larger(Avx512Vec a, Avx512Vec b) {
    return {_mm512_max_ps(a.v, b.v)};
  }

  static Avx512Vec smaller(Avx512Vec a, Avx512Vec b) {
    return {_mm512_min_ps(a.v, b.v)};
  }

  Avx512Vec rounded() const {
    return {_mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT)};
  }

  // Times 2^power, for numbers near 1 and whole powers up to 0: 0 where that is not a normal number (the instruction
  // would round it, which takes a hundred times as long).
  Avx512Vec times_two_to(Avx512Vec power) const {
    const __mmask16 normal = _mm512_cmp_ps_mask(power.v, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
    return {_mm512_maskz_scalef_ps(normal, v, power.v)};
  }

  float largest() const {
    return _mm512_reduce_max_ps(v);
  }

  float total() const {
    return _mm512_reduce_add_ps(v);
  }

  // The larger magnitude of each; NaN is larger than anything, as its bits are.
  static Avx512Vec max_magnitude(Avx512Vec a, Avx512Vec b) {
    return {_mm512_castsi512_ps(_mm512_max_epi32(magnitude(a.v), magnitude(b.v)))};
  }

  // 0 in the lanes that have a bit.
  Avx512Vec without(unsigned lanes) const {
    return {_mm512_mask_mov_ps(v, __mmask16(lanes), _mm512_setzero_ps())};
  }

  // A bit for each lane of at least that magnitude, which is set to 0.
  unsigned take_outliers(Avx512Vec threshold) {
    const __mmask16 outlier = _mm512_cmp_ps_mask(_mm512_castsi512_ps(magnitude(v)), threshold.v, _CMP_GE_OQ);
    v = _mm512_mask_mov_ps(v, outlier, _mm512_setzero_ps());
    return outlier;
  }

 private:
  static __m512i magnitude(__m512 v) {
    return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
  }

  static __m128i eight_bytes(const int8_t* from, int64_t stride) {
    const int8_t* next = from + 4 * stride;
    __m128i bytes = _mm_cvtsi32_si128(uint8_t(from[0]));
    bytes = _mm_insert_epi8(bytes, from[stride], 1);
    bytes = _mm_insert_epi8(bytes, from[2 * stride], 2);
    bytes = _mm_insert_epi8(bytes, from[3 * stride], 3);
    bytes = _mm_insert_epi8(bytes, next[0], 4);
    bytes = _mm_insert_epi8(bytes, next[stride], 5);
    bytes = _mm_insert_epi8(bytes, next[2 * stride], 6);
    return _mm_insert_epi8(bytes, next[3 * stride], 7);
  }
};

}  // namespace
}  // namespace int8compile
