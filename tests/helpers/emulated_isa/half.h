// float16 to float32 and back, as the instructions do it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

inline float from_half(uint16_t half) {
  const int sign = half & 0x8000 ? -1 : 1, exponent = half >> 10 & 31, fraction = half & 1023;
  if (exponent == 31) {
    const uint32_t bits = uint32_t(half & 0x8000) << 16 | 0x7f800000 | uint32_t(fraction) << 13 |
        (fraction != 0 ? 0x00400000 : 0);  // a NaN comes out quiet
    float result;
    std::memcpy(&result, &bits, sizeof(result));
    return result;
  }
  const float size = exponent == 0 ? std::ldexp(float(fraction), -24) : std::ldexp(float(1024 + fraction), exponent - 25);
  return std::copysign(size, float(sign));
}

// To the nearest, ties to even.
inline uint16_t to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return uint16_t(sign | 0x7e00 | (bits >> 13 & 0x1ff));
  }
  const float size = std::fabs(value);
  if (size >= 65520.0f) {
    return sign | 0x7c00;
  }
  int exponent = 0;
  std::frexp(size, &exponent);
  const int unit = size < 0x1p-14f ? -24 : exponent - 11;  // of the last of 11 bits, or of a subnormal
  const int units = int(std::nearbyint(std::ldexp(size, -unit)));  // up to 2048, where the exponent goes up
  return uint16_t(sign | (unit == -24 ? units : ((unit + 25) << 10) + (units - 1024)));
}

}  // namespace emulated
