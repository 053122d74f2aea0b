// The x86 intrinsics that csrc/cpu's AVX512, VNNI and AMX files use, in plain C++: found before the compiler's own
// <immintrin.h>, it lets those files compile and run on any machine. One lane at a time and slow, as the manual's
// operation sections have it; what the manual leaves undefined is filled with rubbish here.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"
#include "registers.h"
#include "tiles.h"

#define _CMP_UNORD_Q 3
#define _CMP_NLT_UQ 21
#define _CMP_GE_OQ 29
#define _MM_FROUND_TO_NEAREST_INT 0
#define _MM_HINT_T0 3
#define _MM_HINT_T1 2

using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

inline void _mm_prefetch(const char*, int) {}

// 128 bits.

inline __m128i _mm_loadu_si128(const __m128i* from) {
  return emulated::load<__m128i>(from);
}

inline void _mm_storeu_si128(__m128i* to, __m128i v) {
  std::memcpy(static_cast<void*>(to), &v, sizeof(v));
}

inline __m128i _mm_set1_epi32(int value) {
  return emulated::make<int32_t, __m128i>([=](int) { return value; });
}

inline __m128i _mm_add_epi32(__m128i a, __m128i b) {
  return emulated::make<uint32_t, __m128i>([&](int i) { return a.lane<uint32_t>(i) + b.lane<uint32_t>(i); });
}

inline __m128i _mm_cvtsi32_si128(int value) {
  return emulated::make<int32_t, __m128i>([=](int i) { return i == 0 ? value : 0; });
}

inline int _mm_cvtsi128_si32(__m128i v) {
  return v.lane<int32_t>(0);
}

inline __m128i _mm_insert_epi8(__m128i v, int value, int at) {
  v.bytes[at] = uint8_t(value);
  return v;
}

inline __m128i _mm_unpacklo_epi64(__m128i a, __m128i b) {
  return emulated::unpack<uint64_t>(a, b, 0);
}

// 256 bits.

inline __m256i _mm256_setzero_si256() {
  return emulated::make<uint8_t, __m256i>([](int) { return 0; });
}

inline __m256i _mm256_set1_epi8(char value) {
  return emulated::make<int8_t, __m256i>([=](int) { return value; });
}

inline __m256i _mm256_set1_epi32(int value) {
  return emulated::make<int32_t, __m256i>([=](int) { return value; });
}

inline __m256i _mm256_loadu_si256(const __m256i* from) {
  return emulated::load<__m256i>(from);
}

inline void _mm256_storeu_si256(__m256i* to, __m256i v) {
  std::memcpy(static_cast<void*>(to), &v, sizeof(v));
}

inline __m256i _mm256_xor_si256(__m256i a, __m256i b) {
  return emulated::make<uint8_t, __m256i>([&](int i) { return a.bytes[i] ^ b.bytes[i]; });
}

inline __m256i _mm256_add_epi32(__m256i a, __m256i b) {
  return emulated::make<uint32_t, __m256i>([&](int i) { return a.lane<uint32_t>(i) + b.lane<uint32_t>(i); });
}

// Of each 128-bit half: two sums of neighbours in a, then two in b.
inline __m256i _mm256_hadd_epi32(__m256i a, __m256i b) {
  return emulated::make<uint32_t, __m256i>([&](int i) {
    const __m256i& from = i % 4 < 2 ? a : b;
    const int at = i / 4 * 4 + i % 2 * 2;
    return from.lane<uint32_t>(at) + from.lane<uint32_t>(at + 1);
  });
}

inline __m128i _mm256_castsi256_si128(__m256i v) {
  return emulated::load<__m128i>(v.bytes);
}

inline __m128i _mm256_extracti128_si256(__m256i v, int half) {
  return emulated::load<__m128i>(v.bytes + 16 * half);
}

inline __m256i _mm256_castsi128_si256(__m128i v) {
  return emulated::make<uint8_t, __m256i>([&](int i) { return i < 16 ? v.bytes[i] : uint8_t(0xa5); });
}

inline __m256i _mm256_inserti128_si256(__m256i v, __m128i half, int at) {
  std::memcpy(v.bytes + 16 * at, half.bytes, sizeof(half.bytes));
  return v;
}

inline __m256i _mm256_unpacklo_epi32(__m256i a, __m256i b) {
  return emulated::unpack<uint32_t>(a, b, 0);
}

inline __m256i _mm256_unpackhi_epi32(__m256i a, __m256i b) {
  return emulated::unpack<uint32_t>(a, b, 1);
}

inline __m256i _mm256_unpacklo_epi64(__m256i a, __m256i b) {
  return emulated::unpack<uint64_t>(a, b, 0);
}

inline __m256i _mm256_unpackhi_epi64(__m256i a, __m256i b) {
  return emulated::unpack<uint64_t>(a, b, 1);
}

inline __m256i _mm256_dpbusd_avx_epi32(__m256i acc, __m256i u, __m256i s) {
  return emulated::dpbusd(acc, u, s);
}

// 512 bits: bytes and integers.

inline __m512i _mm512_setzero_si512() {
  return emulated::make<uint8_t, __m512i>([](int) { return 0; });
}

inline __m512i _mm512_set1_epi8(char value) {
  return emulated::make<int8_t, __m512i>([=](int) { return value; });
}

inline __m512i _mm512_set1_epi32(int value) {
  return emulated::make<int32_t, __m512i>([=](int) { return value; });
}

inline __m512i _mm512_loadu_si512(const void* from) {
  return emulated::load<__m512i>(from);
}

inline void _mm512_storeu_si512(void* to, __m512i v) {
  std::memcpy(to, &v, sizeof(v));
}

// Reads no byte whose bit is not set.
inline __m512i _mm512_maskz_loadu_epi8(__mmask64 mask, const void* from) {
  return emulated::make<uint8_t, __m512i>(
      [=](int i) { return mask >> i & 1 ? static_cast<const uint8_t*>(from)[i] : uint8_t(0); });
}

inline __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  return emulated::make<uint8_t, __m512i>([&](int i) { return a.bytes[i] ^ b.bytes[i]; });
}

inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
  return emulated::make<uint8_t, __m512i>([&](int i) { return a.bytes[i] & b.bytes[i]; });
}

inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return emulated::make<uint32_t, __m512i>([&](int i) { return a.lane<uint32_t>(i) + b.lane<uint32_t>(i); });
}

inline __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return emulated::make<int32_t, __m512i>(
      [&](int i) { return a.lane<int32_t>(i) > b.lane<int32_t>(i) ? a.lane<int32_t>(i) : b.lane<int32_t>(i); });
}

inline __m512i _mm512_set1_epi16(short value) {
  return emulated::make<int16_t, __m512i>([=](int) { return value; });
}

// Reads no word whose bit is not set.
inline __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* from) {
  return emulated::make<uint16_t, __m512i>(
      [=](int i) { return mask >> i & 1 ? static_cast<const uint16_t*>(from)[i] : uint16_t(0); });
}

inline __m512i _mm512_maskz_mov_epi16(__mmask32 mask, __m512i v) {
  return emulated::make<uint16_t, __m512i>([&](int i) { return mask >> i & 1 ? v.lane<uint16_t>(i) : uint16_t(0); });
}

inline __m512i _mm512_max_epu16(__m512i a, __m512i b) {
  return emulated::make<uint16_t, __m512i>(
      [&](int i) { return a.lane<uint16_t>(i) > b.lane<uint16_t>(i) ? a.lane<uint16_t>(i) : b.lane<uint16_t>(i); });
}

inline __mmask32 _mm512_cmple_epu16_mask(__m512i a, __m512i b) {
  __mmask32 mask = 0;
  for (int i = 0; i < 32; ++i) {
    mask |= __mmask32(a.lane<uint16_t>(i) <= b.lane<uint16_t>(i)) << i;
  }
  return mask;
}

inline __mmask32 _mm512_cmpge_epu16_mask(__m512i a, __m512i b) {
  return _mm512_cmple_epu16_mask(b, a);
}

inline __m512i _mm512_slli_epi32(__m512i v, unsigned by) {
  return emulated::make<uint32_t, __m512i>([&](int i) { return v.lane<uint32_t>(i) << by; });
}

inline __m512i _mm512_srli_epi32(__m512i v, unsigned by) {
  return emulated::make<uint32_t, __m512i>([&](int i) { return v.lane<uint32_t>(i) >> by; });
}

inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) {
  return emulated::unpack<uint32_t>(a, b, 0);
}

inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) {
  return emulated::unpack<uint32_t>(a, b, 1);
}

inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) {
  return emulated::unpack<uint64_t>(a, b, 0);
}

inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) {
  return emulated::unpack<uint64_t>(a, b, 1);
}

inline __m256i _mm512_castsi512_si256(__m512i v) {
  return emulated::load<__m256i>(v.bytes);
}

inline __m512i _mm512_castsi128_si512(__m128i v) {
  return emulated::make<uint8_t, __m512i>([&](int i) { return i < 16 ? v.bytes[i] : uint8_t(0xa5); });
}

inline __m256i _mm512_extracti64x4_epi64(__m512i v, int half) {
  return emulated::load<__m256i>(v.bytes + 32 * half);
}

inline __m512i _mm512_mask_broadcast_i32x4(__m512i source, __mmask16 mask, __m128i v) {
  return emulated::make<uint32_t, __m512i>(
      [&](int i) { return mask >> i & 1 ? v.lane<uint32_t>(i % 4) : source.lane<uint32_t>(i); });
}

inline __m512i _mm512_mask_mov_epi32(__m512i source, __mmask16 mask, __m512i v) {
  return emulated::make<uint32_t, __m512i>(
      [&](int i) { return (mask >> i & 1 ? v : source).template lane<uint32_t>(i); });
}

inline __m512i _mm512_dpbusd_epi32(__m512i acc, __m512i u, __m512i s) {
  return emulated::dpbusd(acc, u, s);
}

inline __m512i _mm512_cvtepi8_epi32(__m128i v) {
  return emulated::make<int32_t, __m512i>([&](int i) { return v.lane<int8_t>(i); });
}

inline __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return emulated::make<int32_t, __m512i>([&](int i) { return v.lane<uint16_t>(i); });
}

inline __m256i _mm512_cvtepi32_epi16(__m512i v) {
  return emulated::make<uint16_t, __m256i>([&](int i) { return uint16_t(v.lane<uint32_t>(i)); });
}

inline __m128i _mm512_cvtsepi32_epi8(__m512i v) {
  return emulated::make<int8_t, __m128i>([&](int i) {
    const int32_t lane = v.lane<int32_t>(i);
    return lane < -128 ? -128 : lane > 127 ? 127 : lane;
  });
}

// 512 bits: floats.

inline __m512 _mm512_setzero_ps() {
  return emulated::make<float, __m512>([](int) { return 0.0f; });
}

inline __m512 _mm512_set1_ps(float value) {
  return emulated::make<float, __m512>([=](int) { return value; });
}

inline __m512 _mm512_loadu_ps(const void* from) {
  return emulated::load<__m512>(from);
}

inline void _mm512_storeu_ps(void* to, __m512 v) {
  std::memcpy(to, &v, sizeof(v));
}

inline __m512 _mm512_castsi512_ps(__m512i v) {
  return emulated::load<__m512>(v.bytes);
}

inline __m512i _mm512_castps_si512(__m512 v) {
  return emulated::load<__m512i>(v.bytes);
}

inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return emulated::make<float, __m512>([&](int i) { return a.lane<float>(i) + b.lane<float>(i); });
}

inline __m512 _mm512_sub_ps(__m512 a, __m512 b) {
  return emulated::make<float, __m512>([&](int i) { return a.lane<float>(i) - b.lane<float>(i); });
}

// b's where either is NaN.
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  return emulated::make<float, __m512>(
      [&](int i) { return a.lane<float>(i) > b.lane<float>(i) ? a.lane<float>(i) : b.lane<float>(i); });
}

inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  return emulated::make<float, __m512>(
      [&](int i) { return a.lane<float>(i) < b.lane<float>(i) ? a.lane<float>(i) : b.lane<float>(i); });
}

inline __m512 _mm512_roundscale_ps(__m512 v, int how) {
  emulated::require(how == _MM_FROUND_TO_NEAREST_INT, "_mm512_roundscale_ps: a rounding not emulated");
  return emulated::make<float, __m512>([&](int i) { return std::nearbyint(v.lane<float>(i)); });
}

inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b) {
  return emulated::make<float, __m512>([&](int i) {
    const float power = std::floor(b.lane<float>(i));
    return !(mask >> i & 1) ? 0.0f : std::isnan(power) ? power : std::ldexp(a.lane<float>(i), int(power));
  });
}

inline float _mm512_reduce_max_ps(__m512 v) {
  float most = v.lane<float>(0);
  for (int i = 1; i < 16; ++i) {
    most = most > v.lane<float>(i) ? most : v.lane<float>(i);
  }
  return most;
}

inline float _mm512_reduce_add_ps(__m512 v) {
  float sum = 0;
  for (int i = 0; i < 16; ++i) {
    sum += v.lane<float>(i);
  }
  return sum;
}

inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return emulated::make<uint8_t, __m512i>([&](int i) { return a.bytes[i] | b.bytes[i]; });
}

// 512 bits: bfloat16, of which subnormal numbers are taken for 0.

inline __m256i _mm512_cvtneps_pbh(__m512 v) {
  return emulated::make<uint16_t, __m256i>([&](int i) {
    const uint32_t bits = v.lane<uint32_t>(i), magnitude = bits & 0x7fffffff;
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return uint16_t(magnitude > 0x7f800000 ? bits >> 16 | 0x40 : magnitude < 0x00800000 ? bits >> 16 & 0x8000 : rounded >> 16);
  });
}

inline __m512 _mm512_dpbf16_ps(__m512 acc, __m512i a, __m512i b) {
  const auto element = [](const __m512i& v, int i) {
    const uint32_t bits = uint32_t(v.lane<uint16_t>(i)) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return std::fpclassify(value) == FP_SUBNORMAL ? 0.0f : value;
  };
  return emulated::make<float, __m512>([&](int i) {
    const float odd = std::fma(element(a, 2 * i + 1), element(b, 2 * i + 1), acc.lane<float>(i));
    return std::fma(element(a, 2 * i), element(b, 2 * i), odd);
  });
}

inline __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return emulated::make<float, __m512>([&](int i) { return a.lane<float>(i) * b.lane<float>(i); });
}

inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::make<float, __m512>(
      [&](int i) { return std::fma(a.lane<float>(i), b.lane<float>(i), c.lane<float>(i)); });
}

inline __m512 _mm512_unpacklo_ps(__m512 a, __m512 b) {
  return emulated::unpack<float>(a, b, 0);
}

inline __m512 _mm512_unpackhi_ps(__m512 a, __m512 b) {
  return emulated::unpack<float>(a, b, 1);
}

// Of each 128 bits: two lanes of a, then two of b, chosen by two bits each.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int how) {
  return emulated::make<float, __m512>(
      [&](int i) { return (i % 4 < 2 ? a : b).template lane<float>(i / 4 * 4 + (how >> 2 * (i % 4) & 3)); });
}

// The same with fours of lanes for lanes.
inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int how) {
  return emulated::make<float, __m512>(
      [&](int i) { return (i < 8 ? a : b).template lane<float>((how >> 2 * (i / 4) & 3) * 4 + i % 4); });
}

inline __m128 _mm512_castps512_ps128(__m512 v) {
  return emulated::load<__m128>(v.bytes);
}

inline void _mm_storeu_ps(float* to, __m128 v) {
  std::memcpy(to, v.bytes, sizeof(v.bytes));
}

inline __m512 _mm512_mask_mov_ps(__m512 source, __mmask16 mask, __m512 v) {
  return emulated::make<float, __m512>([&](int i) { return (mask >> i & 1 ? v : source).template lane<float>(i); });
}

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const float p = a.lane<float>(i), q = b.lane<float>(i);
    const bool unordered = std::isnan(p) || std::isnan(q);
    emulated::require(
        how == _CMP_UNORD_Q || how == _CMP_NLT_UQ || how == _CMP_GE_OQ, "_mm512_cmp_ps_mask: a comparison not emulated");
    mask |= unsigned(how == _CMP_UNORD_Q ? unordered : how == _CMP_NLT_UQ ? !(p < q) : !unordered && p >= q) << i;
  }
  return __mmask16(mask);
}

inline __m512 _mm512_cvtepi32_ps(__m512i v) {
  return emulated::make<float, __m512>([&](int i) { return float(v.lane<int32_t>(i)); });
}

inline __m512i _mm512_cvtps_epi32(__m512 v) {
  return emulated::make<int32_t, __m512i>([&](int i) {
    const float whole = std::nearbyint(v.lane<float>(i));  // ties to even, as the rounding mode is
    return whole >= -0x1p31f && whole < 0x1p31f ? int32_t(whole) : INT32_MIN;
  });
}

inline __m512 _mm512_cvtph_ps(__m256i v) {
  return emulated::make<float, __m512>([&](int i) { return emulated::from_half(v.lane<uint16_t>(i)); });
}

inline __m256i _mm512_cvtps_ph(__m512 v, int how) {
  emulated::require(how == _MM_FROUND_TO_NEAREST_INT, "_mm512_cvtps_ph: a rounding not emulated");
  return emulated::make<uint16_t, __m256i>([&](int i) { return emulated::to_half(v.lane<float>(i)); });
}
