// The provider for x86 with AVX512 and its int8 dot products (Cascade Lake, Zen 4 and later).
//
// vpdpbusd multiplies unsigned by signed codes, 64 an instruction. The weight is the unsigned operand, shifted by
// flipping its sign bit (w + 128) as it is loaded, and 128 times the row sum of the activation comes off at the end:
//
//   sum q (w + 128)  -  128 sum q  =  sum q w
//
// That takes one exclusive or for a weight register that serves six rows, row sums once a row, and no copy of either
// operand. All of it is modulo 2^32, so the shifted sums may wrap. The rest of the provider is AVX2's.
//
// Checked so far in emulation only: no machine with these instructions has run it.

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni")
#endif

namespace int8compile {
namespace {

constexpr int64_t kStep = 64;
constexpr int kRows = 6, kCols = 4;  // 24 accumulators of the 32 registers
constexpr int64_t kDepth = 4096;  // of six rows: 24 KB, in L1

template <int rows, int cols>
inline void block(Codes a, Codes b, int64_t k, bool add, int32_t* sums) {
  const __m512i flip = _mm512_set1_epi8(-128);
  __m512i acc[rows][cols];
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < cols; ++n) {
      acc[r][n] = _mm512_setzero_si512();
    }
  }
  const auto step = [&](int64_t at, __mmask64 mask) {
    __m512i w[cols];
    for (int n = 0; n < cols; ++n) {
      w[n] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, b.data + n * b.stride + at), flip);
    }
    for (int r = 0; r < rows; ++r) {
      const __m512i q = _mm512_maskz_loadu_epi8(mask, a.data + r * a.stride + at);
      for (int n = 0; n < cols; ++n) {
        acc[r][n] = _mm512_dpbusd_epi32(acc[r][n], w[n], q);
      }
    }
  };
  int64_t at = 0;
  for (; at + kStep <= k; at += kStep) {
    step(at, ~__mmask64(0));
  }
  if (at < k) {
    step(at, (__mmask64(1) << (k - at)) - 1);
  }
  for (int r = 0; r < rows; ++r) {
    for (int n = 0; n < cols; ++n) {
      const int32_t sum = _mm512_reduce_add_epi32(acc[r][n]);
      int32_t& to = sums[r * kTileCols + n];
      to = int32_t(uint32_t(sum) + (add ? uint32_t(to) : 0u));
    }
  }
}

template <int rows>
inline void block_rows(Codes a, Codes b, int64_t cols, int64_t k, bool add, int32_t* sums) {
  int64_t n = 0;
  for (; n + kCols <= cols; n += kCols) {
    block<rows, kCols>(a, {b.data + n * b.stride, b.stride}, k, add, sums + n);
  }
  for (; n < cols; ++n) {
    block<rows, 1>(a, {b.data + n * b.stride, b.stride}, k, add, sums + n);
  }
}

int32_t row_sum(const int8_t* q, int64_t k) {
  __m512i acc = _mm512_setzero_si512();
  int64_t at = 0;
  for (; at + kStep <= k; at += kStep) {
    acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), _mm512_loadu_si512(q + at));
  }
  if (at < k) {
    const __mmask64 mask = (__mmask64(1) << (k - at)) - 1;
    acc = _mm512_dpbusd_epi32(acc, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(mask, q + at));
  }
  return _mm512_reduce_add_epi32(acc);
}

void vnni_product(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
  int64_t start = 0;
  do {
    const int64_t depth = k - start < kDepth ? k - start : kDepth;
    const Codes right = {b.data + start, b.stride};
    for (int64_t r = 0; r < rows; r += kRows) {
      const Codes left = {a.data + r * a.stride + start, a.stride};
      int32_t* to = sums + r * kTileCols;
      switch (rows - r) {
        case 1:
          block_rows<1>(left, right, cols, depth, start > 0, to);
          break;
        case 2:
          block_rows<2>(left, right, cols, depth, start > 0, to);
          break;
        case 3:
          block_rows<3>(left, right, cols, depth, start > 0, to);
          break;
        case 4:
          block_rows<4>(left, right, cols, depth, start > 0, to);
          break;
        case 5:
          block_rows<5>(left, right, cols, depth, start > 0, to);
          break;
        default:
          block_rows<6>(left, right, cols, depth, start > 0, to);
      }
    }
    start += depth;
  } while (start < k);
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t shift = uint32_t(row_sum(a.data + r * a.stride, k)) * 128u;
    for (int64_t n = 0; n < cols; ++n) {
      int32_t& sum = sums[r * kTileCols + n];
      sum = int32_t(uint32_t(sum) - shift);
    }
  }
}

}  // namespace

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const Kernels* avx512vnni_kernels() {
  static const Kernels table = [] {
    Kernels made = *avx2_kernels();
    made.name = "avx512vnni";
    made.multiply = vnni_product;
    return made;
  }();
  return &table;
}

}  // namespace int8compile

#else

const int8compile::Kernels* int8compile::avx512vnni_kernels() {
  return nullptr;
}

#endif
