// Eight floats as an array, with the operations that quantize.h and finish.h are written in.
//
// The plain loops are of a shape that compilers turn into whatever vector instructions the architecture's baseline
// has. Include it last: it is meant to be compiled for the including file's instruction set alone, hence the
// anonymous namespace.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace int8compile {
namespace {

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

inline float to_float(float value) {
  return value;
}

inline float to_float(BF16 value) {
  return bits_as<float>(uint32_t(value.bits) << 16);
}

inline float to_float(F16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  if (magnitude >= 0x7c00) {  // Inf and NaN
    return bits_as<float>(sign | 0x7f800000 | magnitude << 13);
  }
  if (magnitude < 0x0400) {  // subnormal: a multiple of 2^-24
    const float size = float(magnitude) * 0x1p-24f;
    return sign ? -size : size;
  }
  return bits_as<float>(sign | ((magnitude << 13) + (112u << 23)));  // exponent bias 15 to 127
}

inline void from_float(float value, float& out) {
  out = value;
}

inline void from_float(float value, BF16& out) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out.bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

inline void from_float(float value, F16& out) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // 65520 and more round to Inf
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: 0.5 has units of 2^-24, as subnormals have
    half = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  } else {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out.bits = uint16_t(sign | half);
}

struct PortableVec {
  static constexpr int64_t width = 8;
  static constexpr int registers = 8;
  float lane[8];

  template <class Make>
  static PortableVec make(Make make_lane) {
    PortableVec v;
    for (int i = 0; i < 8; ++i) {
      v.lane[i] = make_lane(i);
    }
    return v;
  }

  static PortableVec all(float value) {
    return make([=](int) { return value; });
  }

  template <class T>
  static PortableVec load(const T* from) {
    return make([=](int i) { return to_float(from[i]); });
  }

  static PortableVec load(const int32_t* from) {
    return make([=](int i) { return float(from[i]); });
  }

  static PortableVec load(const int8_t* from) {
    return make([=](int i) { return float(from[i]); });
  }

  // Bytes from[0], from[stride], ... as floats.
  static PortableVec load_strided(const int8_t* from, int64_t stride) {
    return make([=](int i) { return float(from[i * stride]); });
  }

  template <class T>
  void store(T* to) const {
    for (int i = 0; i < 8; ++i) {
      from_float(lane[i], to[i]);
    }
  }

  // Each rounded to the nearest integer, ties to even; only for magnitudes the eight codes can hold.
  void store_codes(int8_t* to) const {
    const float shift = 0x1.8p23f;  // adding it leaves no bits for a fraction
    for (int i = 0; i < 8; ++i) {
      to[i] = int8_t(int32_t((lane[i] + shift) - shift));
    }
  }

  PortableVec operator+(const PortableVec& o) const {
    return make([&](int i) { return lane[i] + o.lane[i]; });
  }

  PortableVec operator*(const PortableVec& o) const {
    return make([&](int i) { return lane[i] * o.lane[i]; });
  }

  PortableVec plus_product(const PortableVec& a, const PortableVec& b) const {
    return make([&](int i) { return lane[i] + a.lane[i] * b.lane[i]; });
  }

  // to [4] = the sum of the lanes of each.
  static void store_sums(
      const PortableVec& a, const PortableVec& b, const PortableVec& c, const PortableVec& d, float* to) {
    const PortableVec* each[4] = {&a, &b, &c, &d};
    for (int i = 0; i < 4; ++i) {
      const float* v = each[i]->lane;
      to[i] = ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
  }

  PortableVec operator-(const PortableVec& o) const {
    return make([&](int i) { return lane[i] - o.lane[i]; });
  }

  // The larger or smaller of each; b's where either is NaN, as the instructions have it.
  static PortableVec larger(const PortableVec& a, const PortableVec& b) {
    return make([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }

  static PortableVec smaller(const PortableVec& a, const PortableVec& b) {
    return make([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
  }

  // To the nearest integer; magnitudes of 2^22 and more need not stay what they are.
  PortableVec rounded() const {
    const float shift = 0x1.8p23f;
    return make([&](int i) { return (lane[i] + shift) - shift; });
  }

  // Times 2^power, for numbers near 1 and whole powers up to 0: 0 where that is not a normal number.
  PortableVec times_two_to(const PortableVec& power) const {
    return make([&](int i) {
      const float p = power.lane[i] > -127.0f ? power.lane[i] : -127.0f;
      const float scaled = lane[i] * bits_as<float>(uint32_t(int32_t(p) + 127) << 23);
      return power.lane[i] < -125.0f ? 0.0f : scaled;
    });
  }

  float largest() const {
    float most = lane[0];
    for (int i = 1; i < 8; ++i) {
      most = lane[i] > most ? lane[i] : most;
    }
    return most;
  }

  float total() const {
    return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7]));
  }

  // The larger magnitude of each; NaN is larger than anything, as its bits are.
  static PortableVec max_magnitude(const PortableVec& a, const PortableVec& b) {
    return make([&](int i) {
      const int32_t p = bits_as<int32_t>(a.lane[i]) & 0x7fffffff, q = bits_as<int32_t>(b.lane[i]) & 0x7fffffff;
      return bits_as<float>(p > q ? p : q);
    });
  }

  // 0 in the lanes that have a bit.
  PortableVec without(unsigned lanes) const {
    return make([&](int i) { return lanes >> i & 1 ? 0.0f : lane[i]; });
  }

  // A bit for each lane of at least that magnitude, which is set to 0.
  unsigned take_outliers(const PortableVec& threshold) {
    unsigned mask = 0;
    for (int i = 0; i < 8; ++i) {
      const bool outlier = std::fabs(lane[i]) >= threshold.lane[i];
      mask |= unsigned(outlier) << i;
      lane[i] = outlier ? 0.0f : lane[i];
    }
    return mask;
  }
};

}  // namespace
}  // namespace int8compile
