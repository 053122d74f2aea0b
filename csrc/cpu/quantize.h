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
};

template <class Vec, class T>
inline float quantize_row(const T* x, int64_t k, float threshold, int8_t* codes, uint8_t* outliers) {
  constexpr float tiny = 0x1p-120f;  // below it 127 / absmax would overflow
  const RowScan scan = Scan<Vec, T>::run(x, k, threshold, outliers);
  const float absmax = scan.absmax < tiny ? 0.0f : scan.absmax;
  const float scale = absmax / 127.0f;
  // A row with a NaN or, undetected, an Inf in it: every code of the reference is NaN or a multiple of 0 there.
  const bool finite = absmax <= std::numeric_limits<float>::max();
  if (absmax == 0 || !finite) {
    if (k > 0) {  // else the codes may be nowhere
      std::memset(codes, 0, k);
    }
    return scale;
  }
  const Vec inverse = Vec::all((1.0f / absmax) * 127.0f);  // two roundings, as torch's 127.0 / tensor has
  const Vec limit = Vec::all(threshold);
  const auto encode = [&](Vec v) {
    if (scan.outliers) {
      v.take_outliers(limit);
    }
    return v * inverse;
  };
  int64_t at = 0;
  for (; at + Vec::width <= k; at += Vec::width) {
    encode(Vec::load(x + at)).store_codes(codes + at);
  }
  if (at < k) {
    int8_t last[Vec::width];
    encode(load_first<Vec>(x + at, k - at)).store_codes(last);
    std::memcpy(codes + at, last, k - at);
  }
  return scale;
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
void residual_row_of(
    const void* x, Float type, const int8_t* codes, float scale, float from, int64_t count, const int32_t* columns,
    float* residual) {
  with_type(type, [&](auto sample) {
    residual_row<Vec>(static_cast<const decltype(sample)*>(x), codes, scale, from, count, columns, residual);
  });
}

}  // namespace
}  // namespace int8compile
