// Rowwise quantisation and the residual it leaves, for one row, in terms of a vector of eight or sixteen floats.
//
// Bit for bit the reference: ops/quantize_rowwise.py and row_codes in ops/quantize_weight.py. The row is read twice,
// the second time from L1 or L2. Magnitudes are compared as integers, which orders floats the same and puts NaN on top,
// so that a NaN reaches the scale as it does in the reference. The threshold is compared in take_outliers of vec_*.h,
// as floats; residual_row compares it again for policy element.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace int8compile {
namespace {

// from[0..count) as a vector, zeros behind.
template <class Vec, class T>
inline Vec load_first(const T* from, int64_t count) {
  T padded[Vec::width] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return Vec::load(padded);
}

inline void flag(unsigned mask, uint8_t* outliers) {
  for (; mask != 0; mask &= mask - 1) {
    // Relaxed is enough: whoever reads the bytes does so after the threads have joined.
    __atomic_store_n(outliers + __builtin_ctz(mask), uint8_t(1), __ATOMIC_RELAXED);
  }
}

// The bits of columns from `at` on, a multiple of 8.
template <class Bits>
inline Bits bits_at(const uint8_t* flags, int64_t at) {
  Bits bits;
  std::memcpy(&bits, flags + at / 8, sizeof(bits));
  return bits;
}

template <class Vec>
inline float largest_lane(const Vec& v) {
  float lanes[Vec::width];
  v.store(lanes);
  int32_t best = 0;
  for (float lane : lanes) {
    int32_t bits;
    std::memcpy(&bits, &lane, sizeof(bits));
    best = bits > best ? bits : best;
  }
  float result;
  std::memcpy(&result, &best, sizeof(result));
  return result;
}

// The row's largest magnitude, outlier elements left out, and whether it has any.
struct RowScan {
  float absmax;
  bool outliers;
};

// Reads a row for the first time and flags the columns of its outliers.
template <class Vec, class T>
struct Scan {
  static RowScan run(const T* x, int64_t k, float threshold, uint8_t* outliers) {
    Vec most = Vec::all(0.0f);
    bool found = false;
    const Vec limit = Vec::all(threshold);
    // Of the lanes that are not in the row, which hold 0, none is flagged: a threshold that compares as 0 would.
    const auto step = [&](Vec v, int64_t at, unsigned lanes) {
      if (outliers != nullptr) {
        if (const unsigned mask = v.take_outliers(limit) & lanes) {
          flag(mask, outliers + at);
          found = true;
        }
      }
      most = Vec::max_magnitude(most, v);
    };
    int64_t at = 0;
    for (; at + Vec::width <= k; at += Vec::width) {
      step(Vec::load(x + at), at, ~0u);
    }
    if (at < k) {
      step(load_first<Vec>(x + at, k - at), at, (1u << (k - at)) - 1);
    }
    return {largest_lane(most), found};
  }

  // The largest magnitude outside of columns whose bits are set.
  static float without(const T* x, int64_t k, const uint8_t* flags) {
    Vec most = Vec::all(0.0f);
    int64_t at = 0;
    for (; at + Vec::width <= k; at += Vec::width) {
      most = Vec::max_magnitude(most, Vec::load(x + at).without(bits_at<uint16_t>(flags, at)));
    }
    if (at < k) {
      most = Vec::max_magnitude(most, load_first<Vec>(x + at, k - at).without(bits_at<uint16_t>(flags, at)));
    }
    return largest_lane(most);
  }
};

// A row's scale, and what its values are multiplied by to give codes: 0 where all codes are.
struct Step {
  float scale, inverse;
};

inline Step step_of(float absmax) {
  constexpr float tiny = 0x1p-120f;  // below it 127 / absmax would overflow
  absmax = absmax < tiny ? 0.0f : absmax;
  // A row with a NaN or, undetected, an Inf in it: every code of the reference is NaN or a multiple of 0 there.
  const bool finite = absmax <= std::numeric_limits<float>::max();
  // Two roundings, as torch's 127.0 / tensor has.
  return {absmax / 127.0f, absmax == 0 || !finite ? 0.0f : (1.0f / absmax) * 127.0f};
}

// codes [k] = those of x, each vector of which `prepare` may change.
template <class Vec, class T, class Prepare>
inline void encode(const T* x, int64_t k, float inverse, int8_t* codes, const Prepare& prepare) {
  const Vec factor = Vec::all(inverse);
  int64_t at = 0;
  for (; at + Vec::width <= k; at += Vec::width) {
    (prepare(Vec::load(x + at)) * factor).store_codes(codes + at);
  }
  if (at < k) {
    int8_t last[Vec::width];
    (prepare(load_first<Vec>(x + at, k - at)) * factor).store_codes(last);
    std::memcpy(codes + at, last, k - at);
  }
}

template <class Vec, class T>
inline float quantize_row(const T* x, int64_t k, float threshold, int8_t* codes, uint8_t* outliers) {
  const RowScan scan = Scan<Vec, T>::run(x, k, threshold, outliers);
  const Step step = step_of(scan.absmax);
  if (step.inverse == 0) {
    if (k > 0) {  // else the codes may be nowhere
      std::memset(codes, 0, k);
    }
    return step.scale;
  }
  const Vec limit = Vec::all(threshold);
  encode<Vec>(x, k, step.inverse, codes, [&](Vec v) {
    if (scan.outliers) {
      v.take_outliers(limit);
    }
    return v;
  });
  return step.scale;
}

// x at `count` columns, a vector's worth of them, zeros behind.
template <class Vec, class T>
inline Vec gather(const T* x, const int32_t* columns, int64_t count) {
  T values[Vec::width] = {};
  for (int64_t i = 0; i < count; ++i) {
    values[i] = x[columns[i]];
  }
  return Vec::load(values);
}

template <class Vec, class T>
inline float quantize_calibrated_row(
    const T* x, int64_t k, const WideColumns& columns, int8_t* codes, int8_t* high) {
  const auto each = [&](auto take) {
    for (int64_t t = 0; t < columns.count; t += Vec::width) {
      const int64_t here = columns.count - t < Vec::width ? columns.count - t : Vec::width;
      take(t, here, gather<Vec>(x, columns.at + t, here));
    }
  };
  Vec most = Vec::all(0.0f);
  each([&](int64_t, int64_t, Vec values) { most = Vec::max_magnitude(most, values); });
  const float outside = Scan<Vec, T>::without(x, k, columns.flags), inside = largest_lane(most) * 0x1p-7f;
  const bool outside_is_larger = !(inside > outside) && inside == inside;  // or is the NaN
  const Step step = step_of(outside_is_larger ? outside : inside);
  if (step.inverse == 0) {
    if (k > 0) {
      std::memset(codes, 0, k);
      std::memset(high, 0, columns.count);
    }
    return step.scale;
  }
  encode<Vec>(x, k, step.inverse, codes, [](Vec v) { return v; });  // in the columns meaningless
  const Vec factor = Vec::all(step.inverse);
  each([&](int64_t t, int64_t here, Vec values) {
    float whole[Vec::width];
    (values * factor).rounded().store(whole);
    for (int64_t i = 0; i < here; ++i) {
      const int32_t code = int32_t(whole[i]);
      const int32_t upper = (code + 64) >> 7;
      high[t + i] = int8_t(upper);
      codes[columns.at[t + i]] = int8_t(code - upper * 128);
    }
  });
  return step.scale;
}

template <class Vec, class T>
inline void residual_row(
    const T* x, const int8_t* codes, float scale, float from, int64_t count, const int32_t* columns, float* residual) {
  for (int64_t t = 0; t < count; t += Vec::width) {
    const int64_t here = count - t < Vec::width ? count - t : Vec::width;
    T values[Vec::width] = {};
    float kept[Vec::width] = {}, covered[Vec::width] = {};
    for (int64_t i = 0; i < here; ++i) {
      values[i] = x[columns[t + i]];
      covered[i] = -(scale * float(codes[columns[t + i]]));
    }
    Vec::load(values).store(kept);
    (Vec::load(kept) + Vec::load(covered)).store(values);  // the rounding to x's dtype
    float rounded[Vec::width];
    Vec::load(values).store(rounded);
    for (int64_t i = 0; i < here; ++i) {
      const float size = kept[i] < 0 ? -kept[i] : kept[i];
      residual[t + i] = from > 0 && !(size >= from) ? 0.0f : rounded[i];
    }
  }
}

template <class Vec>
float quantize_row_of(const void* x, Float type, int64_t k, float threshold, int8_t* codes, uint8_t* outliers) {
  return with_type(type, [&](auto sample) {
    return quantize_row<Vec>(static_cast<const decltype(sample)*>(x), k, threshold, codes, outliers);
  });
}

template <class Vec>
float quantize_calibrated_row_of(
    const void* x, Float type, int64_t k, const WideColumns& columns, int8_t* codes, int8_t* high) {
  return with_type(type, [&](auto sample) {
    return quantize_calibrated_row<Vec>(static_cast<const decltype(sample)*>(x), k, columns, codes, high);
  });
}

template <class Vec>
void residual_row_of(
    const void* x, Float type, const int8_t* codes, float scale, float from, int64_t count, const int32_t* columns,
    float* residual) {
  with_type(type, [&](auto sample) {
    residual_row<Vec>(static_cast<const decltype(sample)*>(x), codes, scale, from, count, columns, residual);
  });
}

}  // namespace
}  // namespace int8compile
