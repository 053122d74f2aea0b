// Vector registers as arrays of bytes, and what several of the emulated intrinsics share.

#pragma once

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

}  // namespace emulated

using __m128i = emulated::Register<16, int>;
using __m128 = emulated::Register<16, float>;
using __m256i = emulated::Register<32, int>;
using __m512i = emulated::Register<64, int>;
using __m512 = emulated::Register<64, float>;
