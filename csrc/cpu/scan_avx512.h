// The largest magnitude and the outliers of a row of 16-bit floats, 32 at a time, with AVX512 BW.
//
// The magnitudes of either 16-bit dtype are ordered as their bits are, so they are compared as integers and no element is
// converted to float: the first of the two readings that a row has takes a third of the instructions.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "quantize.h"
#include "vec_avx512.h"

namespace int8compile {
namespace {

// What differs between the dtypes: infinity's bits, and those of the smallest value that is at least `value`.
inline uint16_t infinity_of(BF16) {
  return 0x7f80;
}

inline uint16_t infinity_of(F16) {
  return 0x7c00;
}

inline uint16_t least_of(BF16, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return uint16_t((bits + 0xffff) >> 16);
}

inline uint16_t least_of(F16, float value) {
  F16 nearest[Avx512Vec::width];
  float rounded[Avx512Vec::width];
  Avx512Vec::all(value).store(nearest);
  Avx512Vec::load(nearest).store(rounded);
  return uint16_t(nearest[0].bits + (rounded[0] < value));
}

template <class T>
struct HalvesScan {
  static constexpr int64_t width = 32;

  static RowScan run(const T* x, int64_t k, float threshold, uint8_t* outliers) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff), infinity = _mm512_set1_epi16(int16_t(infinity_of(T{})));
    // Every magnitude reaches 0 and what is below it (or, where subnormal numbers are flushed, compares as 0); none NaN.
    const uint16_t from = threshold > 0 ? least_of(T{}, threshold) : threshold <= 0 ? 0 : 0xffff;
    const __m512i least = _mm512_set1_epi16(int16_t(from));
    __m512i most = _mm512_setzero_si512();
    bool found = false;
    // Of the lanes that are not in the row, which hold 0, none is flagged: a threshold of 0 would.
    const auto step = [&](__m512i v, int64_t at, __mmask32 lanes) {
      v = _mm512_and_si512(v, magnitude);
      if (outliers != nullptr) {
        const __mmask32 reached = _mm512_cmpge_epu16_mask(v, least);
        if (reached != 0) {  // by NaN, too, which is none
          const __mmask32 taken = lanes & reached & _mm512_cmple_epu16_mask(v, infinity);
          flag(taken, outliers + at);
          found = found || taken != 0;
          v = _mm512_maskz_mov_epi16(~taken, v);
        }
      }
      most = _mm512_max_epu16(most, v);
    };
    int64_t at = 0;
    for (; at + width <= k; at += width) {
      step(_mm512_loadu_si512(x + at), at, ~__mmask32(0));
    }
    if (at < k) {
      const __mmask32 lanes = (__mmask32(1) << (k - at)) - 1;
      step(_mm512_maskz_loadu_epi16(lanes, x + at), at, lanes);
    }
    return {as_float(largest(most)), found};
  }

  static float without(const T* x, int64_t k, const uint8_t* flags) {
    const __m512i magnitude = _mm512_set1_epi16(0x7fff);
    __m512i most = _mm512_setzero_si512();
    const auto step = [&](__m512i v, int64_t at) {
      v = _mm512_and_si512(v, magnitude);
      most = _mm512_max_epu16(most, _mm512_maskz_mov_epi16(~bits_at<__mmask32>(flags, at), v));
    };
    int64_t at = 0;
    for (; at + width <= k; at += width) {
      step(_mm512_loadu_si512(x + at), at);
    }
    if (at < k) {
      step(_mm512_maskz_loadu_epi16((__mmask32(1) << (k - at)) - 1, x + at), at);
    }
    return as_float(largest(most));
  }

 private:
  static uint16_t largest(__m512i values) {
    uint16_t lanes[width], best = 0;
    _mm512_storeu_si512(lanes, values);
    for (const uint16_t lane : lanes) {
      best = lane > best ? lane : best;
    }
    return best;
  }

  static float as_float(uint16_t bits) {
    T padded[Avx512Vec::width] = {{bits}};
    float lanes[Avx512Vec::width];
    Avx512Vec::load(padded).store(lanes);
    return lanes[0];
  }
};

template <>
struct Scan<Avx512Vec, BF16> : HalvesScan<BF16> {};

template <>
struct Scan<Avx512Vec, F16> : HalvesScan<F16> {};

}  // namespace
}  // namespace int8compile
