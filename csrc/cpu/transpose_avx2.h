// The transpose of 8 x 8 32-bit values with AVX2: transpose.h, half as wide.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "target.h"

namespace int8compile {
namespace {

// to[j][i] = from[i][j] for i < 8, j < rows; the strides are in bytes. With `flip`, each byte's sign bit is flipped.
template <bool flip = false>
inline void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows = 8) {
  const auto piece = [&](int64_t row, int64_t at) {
    return _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + row * from_stride + 4 * at));
  };
  const auto put = [&](int64_t row, __m256i values) {
    if (row < rows) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + row * to_stride), values);
    }
  };
  for (int64_t at = 0; at < rows; at += 4) {
    __m256i four[4];  // lane i of four[j]: row 4 i + j, values at, ..., at + 3
    INT8COMPILE_UNROLL
    for (int j = 0; j < 4; ++j) {
      four[j] = _mm256_inserti128_si256(_mm256_castsi128_si256(piece(j, at)), piece(4 + j, at), 1);
      if constexpr (flip) {
        four[j] = _mm256_xor_si256(four[j], _mm256_set1_epi8(-128));
      }
    }
    const __m256i low01 = _mm256_unpacklo_epi32(four[0], four[1]), low23 = _mm256_unpacklo_epi32(four[2], four[3]);
    const __m256i high01 = _mm256_unpackhi_epi32(four[0], four[1]), high23 = _mm256_unpackhi_epi32(four[2], four[3]);
    put(at, _mm256_unpacklo_epi64(low01, low23));
    put(at + 1, _mm256_unpackhi_epi64(low01, low23));
    put(at + 2, _mm256_unpacklo_epi64(high01, high23));
    put(at + 3, _mm256_unpackhi_epi64(high01, high23));
  }
}

}  // namespace
}  // namespace int8compile
