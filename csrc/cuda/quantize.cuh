// Rowwise quantisation of one row by the threads of a block; bit for bit ops/quantize_rowwise.py and row_codes in
// ops/quantize_weight.py.
//
// Magnitudes are compared as integers, which orders floats the same and puts NaN on top, so that a NaN reaches the
// row's scale as it does in the reference.

#pragma once

#include "numbers.cuh"

namespace int8compile {

// 16 bytes of elements.
template <class X>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(X);
  X element[size];
};

// How a row with this largest magnitude is coded.
struct RowCode {
  float scale, inverse;
  bool zero;  // every code is 0: nothing but zeros, or a NaN or an undetected infinity among the elements

  __device__ explicit RowCode(int absmax_bits) {
    const float most = __int_as_float(absmax_bits);
    const float absmax = most < 0x1p-120f ? 0.0f : most;  // below, 127 / absmax would overflow
    scale = __fdiv_rn(absmax, 127.0f);
    inverse = __fmul_rn(__fdiv_rn(1.0f, absmax), 127.0f);  // two roundings, as the reference has
    zero = !(absmax > 0 && absmax <= 3.402823466e38f);
  }

  __device__ int code(float value) const {
    return __float2int_rn(__fmul_rn(value, inverse));
  }
};

__device__ inline bool is_outlier(float value, float threshold) {
  return threshold > 0 && fabsf(value) >= threshold;
}

// The larger of `most` and an element's magnitude, as bits. An outlier does not count; it calls flag(column).
template <class Flag>
__device__ inline int larger(int most, float value, float threshold, int64_t column, const Flag& flag) {
  if (is_outlier(value, threshold)) {
    flag(column);
    return most;
  }
  const int magnitude = __float_as_int(value) & 0x7fffffff;
  return magnitude > most ? magnitude : most;
}

template <class X, class Flag>
__device__ inline int larger(int most, const Pack<X>& pack, float threshold, int64_t column, const Flag& flag) {
#pragma unroll
  for (int i = 0; i < Pack<X>::size; ++i) {
    most = larger(most, to_float(pack.element[i]), threshold, column + i, flag);
  }
  return most;
}

template <class X>
__device__ inline void store_codes(const Pack<X>& pack, const RowCode& row, float threshold, int8_t* codes) {
  constexpr int words = Pack<X>::size / 4;
  uint32_t word[words];
#pragma unroll
  for (int w = 0; w < words; ++w) {
    word[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = to_float(pack.element[4 * w + i]);
      const int code = row.zero || is_outlier(value, threshold) ? 0 : row.code(value);
      word[w] |= (static_cast<uint32_t>(code) & 0xff) << (8 * i);
    }
  }
  if constexpr (words == 2) {
    *reinterpret_cast<uint2*>(codes) = make_uint2(word[0], word[1]);
  } else {
    *reinterpret_cast<uint32_t*>(codes) = word[0];
  }
}

__device__ inline int warp_max(int value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(0xffffffff, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

}  // namespace int8compile
