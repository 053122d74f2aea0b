// Number formats, and the arithmetic of the reference one element at a time, each rounding by name.
//
// The reference rounds after every operation; __fmul_rn and its kin keep the compiler from fusing two into one, so
// that codes, scales and, where there is no outlier product, outputs have the reference's bits.

#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace int8compile {

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

__device__ inline float to_float(float value) {
  return value;
}

__device__ inline float to_float(BF16 value) {
  return from_bf16_bits(value.bits);
}

__device__ inline float to_float(F16 value) {
  return from_f16_bits(value.bits);
}

// Element `at` of an array whose type is known at run time only.
__device__ inline float load_float(const void* data, Float type, int64_t at) {
  switch (type) {
    case Float::bf16:
      return from_bf16_bits(static_cast<const uint16_t*>(data)[at]);
    case Float::f16:
      return from_f16_bits(static_cast<const uint16_t*>(data)[at]);
    default:
      return static_cast<const float*>(data)[at];
  }
}

__device__ inline uint16_t to_16_bits(float value, Float type) {
  return type == Float::bf16 ? to_bf16_bits(value) : to_f16_bits(value);
}

__device__ inline void store_float(void* data, Float type, int64_t at, float value) {
  if (type == Float::f32) {
    static_cast<float*>(data)[at] = value;
  } else {
    static_cast<uint16_t*>(data)[at] = to_16_bits(value, type);
  }
}

__device__ inline uint32_t two_to_16_bits(float first, float second, Float type) {
  return static_cast<uint32_t>(to_16_bits(first, type)) | static_cast<uint32_t>(to_16_bits(second, type)) << 16;
}

// Elements `at` (even) and `at + 1`, both there, of an array aligned to two elements.
__device__ inline void store_two_floats(void* data, Float type, int64_t at, float first, float second) {
  if (type == Float::f32) {
    static_cast<float2*>(data)[at / 2] = make_float2(first, second);
  } else {
    static_cast<uint32_t*>(data)[at / 2] = two_to_16_bits(first, second, type);
  }
}

// What a code leaves over of its element, before the rounding to x's type; 0 below `from`. A NaN is below everything.
__device__ inline float residual_of(float value, float scale, int8_t code, float from) {
  const float left = __fsub_rn(value, __fmul_rn(scale, static_cast<float>(code)));
  return from > 0 && !(fabsf(value) >= from) ? 0.0f : left;
}

__device__ inline float round_to(float value, Float type) {
  switch (type) {
    case Float::bf16:
      return from_bf16_bits(to_bf16_bits(value));
    case Float::f16:
      return from_f16_bits(to_f16_bits(value));
    default:
      return value;
  }
}

// A column's scale and bias, and what they make of row_scale * sum + outlier product.
struct Column {
  float scale, bias;
  bool has_bias;

  __device__ Column(const Product& p, int64_t at)
      : scale(p.weight_scale[at]),
        bias(p.bias == nullptr ? 0.0f : load_float(p.bias, p.bias_type, at)),
        has_bias(p.bias != nullptr) {}

  __device__ float finish(float value) const {
    value = __fmul_rn(value, scale);
    return has_bias ? __fadd_rn(value, bias) : value;
  }
};

inline __host__ __device__ int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace int8compile
