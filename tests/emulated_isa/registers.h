// Vector registers as arrays of bytes, and what several of the emulated intrinsics share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

// What a CPU would raise.
inline void require(bool condition, const char* otherwise) {
  if (!condition) {
    std::fprintf(stderr, "emulated CPU: %s\n", otherwise);
    std::abort();
  }
}

template <int size, class Kind>
struct alignas(size) Register {
  uint8_t bytes[size];

  template <class T>
  T lane(int i) const {
    T value;
    std::memcpy(&value, bytes + i * sizeof(T), sizeof(T));
    return value;
  }
};

template <class V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// A register of lanes of type T, lane i being f(i).
template <class T, class V, class F>
V make(F f) {
  T lanes[sizeof(V) / sizeof(T)];
  for (int i = 0; i < int(sizeof(V) / sizeof(T)); ++i) {
    lanes[i] = T(f(i));
  }
  return load<V>(lanes);
}

// Of each 128 bits: the lanes of the lower or the upper half, one of a, one of b.
template <class T, class V>
V unpack(const V& a, const V& b, int half) {
  constexpr int lanes = 16 / sizeof(T);
  return make<T, V>([&](int i) {
    const int at = i / lanes * lanes + half * lanes / 2 + i % lanes / 2;
    return (i % 2 == 0 ? a : b).template lane<T>(at);
  });
}

// Sums of four products of an unsigned with a signed byte, not saturated.
template <class V>
V dpbusd(const V& acc, const V& u, const V& s) {
  return make<uint32_t, V>([&](int i) {
    int32_t sum = 0;
    for (int j = 4 * i; j < 4 * i + 4; ++j) {
      sum += int32_t(u.template lane<uint8_t>(j)) * int32_t(s.template lane<int8_t>(j));
    }
    return acc.template lane<uint32_t>(i) + uint32_t(sum);
  });
}

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

using __m128i = emulated::Register<16, int>;
using __m256i = emulated::Register<32, int>;
using __m512i = emulated::Register<64, int>;
using __m512 = emulated::Register<64, float>;
