// The transpose of 16 x 16 32-bit values with AVX512.
//
// A register is put together from four rows' 128-bit pieces by the load ports, so that what is left for the one port
// that shuffles is the transpose of 4 x 4 within each 128-bit lane: 32 shuffles, where 64 would be needed otherwise.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "target.h"

namespace int8compile {
namespace {

constexpr int64_t kTransposed = 16;

// to[j][i] = from[i][j] for i < 16, j < rows; the strides are in bytes. With `flip`, each byte's sign bit is flipped.
template <bool flip = false>
inline void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride, int64_t rows = kTransposed) {
  const auto piece = [&](int64_t row, int64_t at) {
    return _mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const char*>(from) + row * from_stride + 4 * at));
  };
  const auto put = [&](int64_t row, __m512i values) {
    if (row < rows) {
      _mm512_storeu_si512(static_cast<char*>(to) + row * to_stride, values);
    }
  };
  for (int64_t at = 0; at < rows; at += 4) {
    __m512i four[4];  // lane i of four[j]: row 4 i + j, values at, ..., at + 3
    INT8COMPILE_UNROLL
    for (int j = 0; j < 4; ++j) {
      four[j] = _mm512_castsi128_si512(piece(j, at));
      four[j] = _mm512_mask_broadcast_i32x4(four[j], 0x00f0, piece(4 + j, at));
      four[j] = _mm512_mask_broadcast_i32x4(four[j], 0x0f00, piece(8 + j, at));
      four[j] = _mm512_mask_broadcast_i32x4(four[j], 0xf000, piece(12 + j, at));
      if constexpr (flip) {
        four[j] = _mm512_xor_si512(four[j], _mm512_set1_epi8(-128));
      }
    }
    const __m512i low01 = _mm512_unpacklo_epi32(four[0], four[1]), low23 = _mm512_unpacklo_epi32(four[2], four[3]);
    const __m512i high01 = _mm512_unpackhi_epi32(four[0], four[1]), high23 = _mm512_unpackhi_epi32(four[2], four[3]);
    put(at, _mm512_unpacklo_epi64(low01, low23));
    put(at + 1, _mm512_unpackhi_epi64(low01, low23));
    put(at + 2, _mm512_unpacklo_epi64(high01, high23));
    put(at + 3, _mm512_unpackhi_epi64(high01, high23));
  }
}

}  // namespace
}  // namespace int8compile
