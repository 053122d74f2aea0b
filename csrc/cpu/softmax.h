// The exponential and the running softmax of a row, in terms of a vector of floats.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "target.h"

namespace int8compile {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLargestFloat = std::numeric_limits<float>::max();

// exp(x) for x <= 0, -inf included; NaN stays NaN. The relative error is below 1e-7 (1 + |x|), and what is below 2^-125
// may be 0.
//
// 2^(x log2 e) by a polynomial on half a unit either side of the nearest integer. Its coefficients are those of the
// smallest largest relative error, 2e-9, rounded to float, with which Horner's rule comes to 8e-8.
template <class Vec>
INT8COMPILE_INLINE Vec exp_of(Vec x) {
  constexpr float coefficients[] = {
      0x1.41d332p-13f, 0x1.5f456ap-10f, 0x1.3b2dbcp-7f, 0x1.c6aed4p-5f, 0x1.ebfbdap-3f, 0x1.62e43p-1f, 1.0f,
  };
  // (Of -inf the fraction would be NaN.)
  const Vec t = Vec::larger(Vec::all(-300.0f), x * Vec::all(0x1.715476p+0f));
  const Vec whole = t.rounded();
  const Vec fraction = t - whole;
  Vec value = Vec::all(coefficients[0]);
  INT8COMPILE_UNROLL
  for (int i = 1; i < 7; ++i) {
    value = Vec::all(coefficients[i]).plus_product(value, fraction);
  }
  return value.times_two_to(whole);
}

// The first `count` values, up to a vector's, as floats; zeros behind.
template <class Vec, class T>
INT8COMPILE_INLINE Vec load_some(const T* from, int64_t count) {
  if (count >= Vec::width) {
    return Vec::load(from);
  }
  T padded[Vec::width] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Vec::load(padded);
}

}  // namespace
}  // namespace int8compile
