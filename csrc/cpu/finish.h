// The epilogue: int32 sums to output, with the outlier product, in terms of a vector of eight or sixteen floats.
//
// In the reference's order, so that without outlier columns the output has the reference's bits:
//   ((row_scale * sum + residual product) * weight_scale + bias), one rounding.
// The sum is that of the codes, plus 128 times that of high bytes, where some columns have any.
// The tile is done in strips of 16 columns. First each gathers its weights in the outlier columns, as floats; then a few
// rows at a time go through all strips, eight registers' worth staying in registers from the sums to the output. So whole
// cache lines are written, which are asked for some rows ahead: the output comes from memory, and waiting for it took more
// time than all arithmetic (and one strip of all rows after the other up to twice the time). The outlier product adds its
// terms in the order of the columns, whatever the tiling, so the result does not depend on the number of threads.

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"

namespace int8compile {
namespace {

constexpr int64_t kRowsAhead = 16;

template <class Vec>
struct Strip {
  static constexpr int vecs = kStrip / Vec::width;
  static constexpr int rows = 8 / vecs;  // at a time: as many chains of additions as keep two units busy
  int64_t at, cols;  // the first column in the tile, and how many there are
  float* gathered;  // [outlier columns, kStrip] weights
  Vec weight_scale[vecs], bias[vecs];
};

// from[0..count) as floats in to[0..kStrip), zeros behind.
template <class Vec, class T>
inline void load_strip(const T* from, int64_t count, Vec* to) {
  T padded[kStrip] = {};
  if (count < kStrip) {
    std::memcpy(padded, from, count * sizeof(T));
    from = padded;
  }
  for (int i = 0; i < Strip<Vec>::vecs; ++i) {
    to[i] = Vec::load(from + i * Vec::width);
  }
}

// strip.gathered[t][n] = weight of the strip's column n in outlier column t.
template <class Vec>
inline void gather_weights(const Tile& tile, const Strip<Vec>& strip) {
  const int8_t* first = tile.weight.data + strip.at * tile.weight.stride;
  for (int64_t t = 0; t < tile.outliers.count; ++t) {
    const int8_t* from = first + tile.outliers.columns[t];
    float* to = strip.gathered + t * kStrip;
    if (strip.cols == kStrip) {
      for (int i = 0; i < Strip<Vec>::vecs; ++i) {
        Vec::load_strided(from + i * Vec::width * tile.weight.stride, tile.weight.stride).store(to + i * Vec::width);
      }
    } else {
      for (int64_t n = 0; n < kStrip; ++n) {
        to[n] = n < strip.cols ? float(from[n * tile.weight.stride]) : 0.0f;
      }
    }
  }
}

template <class Vec, class Out, int rows>
inline void finish_rows(const Tile& tile, const Strip<Vec>& strip, int64_t row) {
  constexpr int vecs = Strip<Vec>::vecs;
  const int64_t count = tile.outliers.count;
  Vec product[rows][vecs];
  INT8COMPILE_UNROLL
  for (int r = 0; r < rows; ++r) {
    INT8COMPILE_UNROLL
    for (int i = 0; i < vecs; ++i) {
      product[r][i] = Vec::all(0.0f);
    }
  }
  const float* residual = tile.outliers.residual + row * count;
  for (int64_t t = 0; t < count; ++t) {
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec left = Vec::all(residual[r * count + t]);
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        const Vec right = Vec::load(strip.gathered + t * kStrip + i * Vec::width);
        product[r][i] = product[r][i].plus_product(left, right);
      }
    }
  }
  INT8COMPILE_UNROLL
  for (int r = 0; r < rows; ++r) {
    const Vec row_scale = Vec::all(tile.row_scale[row + r]);
    Out padded[kStrip];
    Out* out = static_cast<Out*>(tile.out) + (row + r) * tile.out_stride + strip.at;
    Out* to = strip.cols == kStrip ? out : padded;
    INT8COMPILE_UNROLL
    for (int i = 0; i < vecs; ++i) {
      const int64_t at = (row + r) * kTileCols + strip.at + i * Vec::width;
      Vec value = Vec::load(tile.sums + at);
      if (tile.high_sums != nullptr) {
        value = value + Vec::load(tile.high_sums + at) * Vec::all(128.0f);
      }
      value = value * row_scale;
      if (count > 0) {
        value = value + product[r][i];
      }
      value = value * strip.weight_scale[i];
      if (tile.bias != nullptr) {
        value = value + strip.bias[i];
      }
      value.store(to + i * Vec::width);
    }
    if (to == padded) {
      std::memcpy(out, padded, strip.cols * sizeof(Out));
    }
  }
}

template <class Vec>
inline Strip<Vec> strip_of(const Tile& tile, int64_t at) {
  Strip<Vec> strip;
  strip.at = at;
  strip.cols = tile.cols - at < kStrip ? tile.cols - at : kStrip;
  strip.gathered = tile.gathered + at * tile.outliers.count;
  load_strip(tile.weight_scale + at, strip.cols, strip.weight_scale);
  if (tile.bias != nullptr) {
    with_type(tile.bias_type, [&](auto sample) {
      load_strip(static_cast<const decltype(sample)*>(tile.bias) + at, strip.cols, strip.bias);
    });
  }
  gather_weights(tile, strip);
  return strip;
}

// Asks for the output of `rows` rows of the tile, if it has them, for writing.
template <class Out>
inline void ask_for(const Tile& tile, int64_t row, int64_t rows) {
  constexpr int64_t line = 64;
  for (const int64_t end = row + rows < tile.rows ? row + rows : tile.rows; row < end; ++row) {
    const Out* out = static_cast<const Out*>(tile.out) + row * tile.out_stride;
    for (int64_t at = 0; at < tile.cols; at += line / int64_t(sizeof(Out))) {
      __builtin_prefetch(out + at, 1);
    }
  }
}

template <class Vec, class Out>
inline void finish_as(const Tile& tile) {
  constexpr int rows = Strip<Vec>::rows;
  Strip<Vec> strips[kTileCols / kStrip];
  int count = 0;
  for (int64_t at = 0; at < tile.cols; at += kStrip) {
    strips[count++] = strip_of<Vec>(tile, at);
  }
  int64_t row = 0;
  for (; row + rows <= tile.rows; row += rows) {
    ask_for<Out>(tile, row + kRowsAhead, rows);
    for (int i = 0; i < count; ++i) {
      finish_rows<Vec, Out, rows>(tile, strips[i], row);
    }
  }
  for (; row < tile.rows; ++row) {
    for (int i = 0; i < count; ++i) {
      finish_rows<Vec, Out, 1>(tile, strips[i], row);
    }
  }
}

template <class Vec>
void finish_tile(const Tile& tile) {
  with_type(tile.out_type, [&](auto sample) { finish_as<Vec, decltype(sample)>(tile); });
}

}  // namespace
}  // namespace int8compile
