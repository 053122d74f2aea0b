// Eight floats in a ymm register: what vec_portable.h has, with AVX2, FMA and F16C intrinsics.
//
// For files that compile under such a target; hence the anonymous namespace.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"

namespace int8compile {
namespace {

struct Avx2Vec {
  static constexpr int64_t width = 8;
  static constexpr int registers = 16;
  __m256 v;

  static Avx2Vec all(float value) {
    return {_mm256_set1_ps(value)};
  }

  static Avx2Vec load(const float* from) {
    return {_mm256_loadu_ps(from)};
  }

  static Avx2Vec load(const BF16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
  }

  static Avx2Vec load(const F16* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }

  static Avx2Vec load(const int32_t* from) {
    return {_mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }

  static Avx2Vec load(const int8_t* from) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes))};
  }

  // Bytes from[0], from[stride], ... as floats.
  static Avx2Vec load_strided(const int8_t* from, int64_t stride) {
    const int8_t* next = from + 4 * stride;
    __m128i bytes = _mm_cvtsi32_si128(uint8_t(from[0]));
    bytes = _mm_insert_epi8(bytes, from[stride], 1);
    bytes = _mm_insert_epi8(bytes, from[2 * stride], 2);
    bytes = _mm_insert_epi8(bytes, from[3 * stride], 3);
    bytes = _mm_insert_epi8(bytes, next[0], 4);
    bytes = _mm_insert_epi8(bytes, next[stride], 5);
    bytes = _mm_insert_epi8(bytes, next[2 * stride], 6);
    bytes = _mm_insert_epi8(bytes, next[3 * stride], 7);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
  }

  void store(float* to) const {
    _mm256_storeu_ps(to, v);
  }

  void store(BF16* to) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    store_low_halves(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan), to);
  }

  void store(F16* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // Each rounded to the nearest integer, ties to even.
  void store_codes(int8_t* to) const {
    const __m256i whole = _mm256_cvtps_epi32(v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  }

  Avx2Vec operator+(Avx2Vec o) const {
    return {_mm256_add_ps(v, o.v)};
  }

  Avx2Vec operator*(Avx2Vec o) const {
    return {_mm256_mul_ps(v, o.v)};
  }

  Avx2Vec plus_product(Avx2Vec a, Avx2Vec b) const {
    return {_mm256_fmadd_ps(a.v, b.v, v)};
  }

  // to [4] = the sum of the lanes of each.
  static void store_sums(Avx2Vec a, Avx2Vec b, Avx2Vec c, Avx2Vec d, float* to) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1)));
  }

  Avx2Vec operator-(Avx2Vec o) const {
    return {_mm256_sub_ps(v, o.v)};
  }

  // The larger or smaller of each; b's where either is NaN.
  static Avx2Vec larger(Avx2Vec a, Avx2Vec b) {
    return {_mm256_max_ps(a.v, b.v)};
  }

  static Avx2Vec smaller(Avx2Vec a, Avx2Vec b) {
    return {_mm256_min_ps(a.v, b.v)};
  }

  Avx2Vec rounded() const {
    return {_mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }

  // Times 2^power, for numbers near 1 and whole powers up to 0: 0 where that is not a normal number.
  Avx2Vec times_two_to(Avx2Vec power) const {
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(power.v), 23);
    const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(v), exponent));
    return {_mm256_andnot_ps(_mm256_cmp_ps(power.v, _mm256_set1_ps(-125.0f), _CMP_LT_OQ), scaled)};
  }

  float largest() const {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }

  float total() const {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The larger magnitude of each; NaN is larger than anything, as its bits are.
  static Avx2Vec max_magnitude(Avx2Vec a, Avx2Vec b) {
    const __m256i mask = _mm256_set1_epi32(0x7fffffff);
    const __m256i p = _mm256_and_si256(_mm256_castps_si256(a.v), mask);
    const __m256i q = _mm256_and_si256(_mm256_castps_si256(b.v), mask);
    return {_mm256_castsi256_ps(_mm256_max_epi32(p, q))};
  }

  // 0 in the lanes that have a bit.
  Avx2Vec without(unsigned lanes) const {
    const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int32_t(lanes)), bits), bits);
    return {_mm256_andnot_ps(_mm256_castsi256_ps(set), v)};
  }

  // A bit for each lane of at least that magnitude, which is set to 0.
  unsigned take_outliers(Avx2Vec threshold) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), v);
    const __m256 outlier = _mm256_cmp_ps(magnitude, threshold.v, _CMP_GE_OQ);
    v = _mm256_andnot_ps(outlier, v);
    return unsigned(_mm256_movemask_ps(outlier));
  }

 private:
  static void store_low_halves(__m256i words, BF16* to) {
    const __m128i low = _mm256_castsi256_si128(words), high = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi32(low, high));
  }
};

}  // namespace
}  // namespace int8compile
