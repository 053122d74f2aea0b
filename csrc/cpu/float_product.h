// The product of float rows with int8 weights, in terms of a vector of eight or sixteen floats.
//
//   out = weight_scale * sum_k x[k] * weight[k] + bias, the sum in fp32
//
// A code is exact as a float, so weights are read as they are and widened in registers: two instructions that a block
// of up to six rows shares. (Widened once for all rows, in scratch memory, they cost L1 more than that.) A lane adds up
// the products of every 16th (or eighth) feature in their order, and the lanes are added at the end in one fixed order.
// So an output depends on its own row and column alone: not on the rows beside it, nor on how work is split.
//
// Few rows are bound by the weight's way from memory, and a block asks for the codes of the next columns while it works.
// Many rows are bound by multiply-adds, two a cycle, of which a block of rows x cols accumulators has enough chains. K is
// done in pieces, for which the floats of a block of rows stay in L1 while the codes of all columns, a quarter of the
// size, come from L2; between pieces the accumulators wait in scratch memory. (Dot products of bfloat16, vdpbf16ps, would do half as many multiplications a
// second on Emerald Rapids.)
//
// `Vec` is as for finish.h, with load() of codes, store_sums() and `registers`.

#pragma once

#include <cstdint>
#include <cstring>

#include "finish.h"
#include "kernels.h"
#include "target.h"

namespace int8compile {
namespace {

template <class Vec>
void widen_row(const void* x, Float type, int64_t k, float* to) {
  with_type(type, [&](auto sample) {
    using T = decltype(sample);
    const T* from = static_cast<const T*>(x);
    int64_t at = 0;
    for (; at + kFloatStep <= k; at += kFloatStep) {
      for (int64_t i = 0; i < kFloatStep; i += Vec::width) {
        Vec::load(from + at + i).store(to + at + i);
      }
    }
    if (at < k) {
      T padded[kFloatStep] = {};
      std::memcpy(padded, from + at, (k - at) * sizeof(T));
      for (int64_t i = 0; i < kFloatStep; i += Vec::width) {
        Vec::load(padded + i).store(to + at + i);
      }
    }
  });
}

template <class Vec>
class FloatProduct {
 public:
  explicit FloatProduct(const FloatTile& tile)
      : tile_(tile), waiting_(tile.scratch), sums_(waiting_ + kFloatRows * kTileCols * kFloatStep),
        padded_(reinterpret_cast<int8_t*>(sums_ + kFloatRows * kTileCols)) {}

  void run() {
    const int64_t blocks = (tile_.rows + kRows - 1) / kRows;
    const int64_t depth = tile_.rows * 2 <= kRows ? 2 * kFloatDepth : kFloatDepth;
    const int64_t whole = tile_.k / kFloatStep * kFloatStep;  // what is left is a piece of its own
    const int64_t pieces = (whole + depth - 1) / depth + (whole < tile_.k);
    if (pieces == 0) {
      std::memset(sums_, 0, tile_.rows * kTileCols * sizeof(float));
    }
    for (int64_t i = 0, at = 0; i < pieces; ++i, at += depth) {
      const int64_t begin = at < whole ? at : whole, left = whole - begin;
      const Piece piece = {begin, left == 0 ? kFloatStep : left < depth ? left : depth, i == 0, i + 1 == pieces};
      for (int64_t j = 0; j < blocks; ++j) {  // as even as can be: 8 rows as 4 + 4, not 6 + 2
        const int64_t row = tile_.rows * j / blocks;
        some_rows(tile_.rows * (j + 1) / blocks - row, piece, row);
      }
    }
    with_type(tile_.out_type, [&](auto sample) { finish<decltype(sample)>(); });
  }

 private:
  static constexpr int64_t width = Vec::width;
  static constexpr int kRows = Vec::registers >= 32 ? 6 : 3;

  static constexpr int cols_of(int rows) {
    constexpr int accumulators = Vec::registers * 3 / 4;
    return rows * 8 <= accumulators ? 8 : rows * 4 <= accumulators ? 4 : 2;
  }

  // A part of K.
  struct Piece {
    int64_t at, count;
    bool first, last;
  };

  // The codes of a strip of columns along a piece: where they are, or a copy with zeros behind the last column and feature.
  Codes codes_of(int64_t col, Piece piece) const {
    const Codes there = {tile_.weight.data + col * tile_.weight.stride + piece.at, tile_.weight.stride};
    const int64_t cols = tile_.cols - col, features = tile_.k - piece.at;
    if (cols >= kStrip && features >= piece.count) {
      return there;
    }
    std::memset(padded_, 0, kStrip * piece.count);
    for (int64_t n = 0; n < kStrip && n < cols; ++n) {
      std::memcpy(
          padded_ + n * piece.count, there.data + n * there.stride, features < piece.count ? features : piece.count);
    }
    return {padded_, piece.count};
  }

  void some_rows(int64_t rows, Piece piece, int64_t row) {
    switch (rows) {
      case 1:
        return block_rows<1>(piece, row);
      case 2:
        return block_rows<2>(piece, row);
      case 3:
        return block_rows<3>(piece, row);
      default:
        if constexpr (kRows > 3) {
          switch (rows) {
            case 4:
              return block_rows<4>(piece, row);
            case 5:
              return block_rows<5>(piece, row);
            default:
              return block_rows<6>(piece, row);
          }
        }
    }
  }

  template <int rows>
  void block_rows(Piece piece, int64_t row) {
    constexpr int cols = cols_of(rows);
    const float* x = tile_.x + row * tile_.x_stride + piece.at;
    for (int64_t col = 0; col < tile_.cols; col += kStrip) {
      const Codes weight = codes_of(col, piece);
      for (int64_t n = 0; n < kStrip; n += cols) {
        const int64_t element = row * kTileCols + col + n;
        block<rows, cols>(
            piece, x, tile_.x_stride, {weight.data + n * weight.stride, weight.stride}, waiting_ + element * width,
            sums_ + element);
      }
    }
  }

  // The sums of one block along one piece of K. `waiting` has what the pieces before came to, a register an element.
  template <int rows, int cols>
  static void block(Piece piece, const float* x, int64_t x_stride, Codes weight, float* waiting, float* sums) {
    Vec acc[rows][cols];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        acc[r][n] = piece.first ? Vec::all(0.0f) : Vec::load(waiting + (r * kTileCols + n) * width);
      }
    }
    for (int64_t at = 0; at < piece.count; at += width) {
      if (at % 64 == 0) {
        INT8COMPILE_UNROLL
        for (int n = 0; n < cols; ++n) {  // (past the end of the weight that is harmless)
          __builtin_prefetch(weight.data + (cols + n) * weight.stride + at);
        }
      }
      Vec left[rows];
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        left[r] = Vec::load(x + r * x_stride + at);
      }
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        const Vec right = Vec::load(weight.data + n * weight.stride + at);
        INT8COMPILE_UNROLL
        for (int r = 0; r < rows; ++r) {
          acc[r][n] = acc[r][n].plus_product(left[r], right);
        }
      }
    }
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      if (piece.last) {
        put_sums<cols>(acc[r], sums + r * kTileCols);
      } else {
        INT8COMPILE_UNROLL
        for (int n = 0; n < cols; ++n) {
          acc[r][n].store(waiting + (r * kTileCols + n) * width);
        }
      }
    }
  }

  template <int cols>
  static INT8COMPILE_INLINE void put_sums(const Vec (&acc)[cols], float* sums) {
    if constexpr (cols == 2) {
      float four[4];
      Vec::store_sums(acc[0], acc[1], acc[0], acc[1], four);
      std::memcpy(sums, four, 2 * sizeof(float));
    } else {
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; n += 4) {
        Vec::store_sums(acc[n], acc[n + 1], acc[n + 2], acc[n + 3], sums + n);
      }
    }
  }

  // In the reference's order: scale, then bias, one rounding.
  template <class Out>
  void finish() const {
    for (int64_t col = 0; col < tile_.cols; col += kStrip) {
      finish_strip<Out>(col, tile_.cols - col < kStrip ? tile_.cols - col : kStrip);
    }
  }

  template <class Out>
  void finish_strip(int64_t col, int64_t cols) const {
    constexpr int vecs = kStrip / width;
    Vec scale[vecs], bias[vecs];
    load_strip(tile_.weight_scale + col, cols, scale);
    if (tile_.bias != nullptr) {
      with_type(tile_.bias_type, [&](auto sample) {
        load_strip(static_cast<const decltype(sample)*>(tile_.bias) + col, cols, bias);
      });
    }
    for (int64_t row = 0; row < tile_.rows; ++row) {
      Out padded[kStrip];
      Out* out = static_cast<Out*>(tile_.out) + row * tile_.out_stride + col;
      Out* to = cols == kStrip ? out : padded;
      for (int i = 0; i < vecs; ++i) {
        Vec value = Vec::load(sums_ + row * kTileCols + col + i * width) * scale[i];
        if (tile_.bias != nullptr) {
          value = value + bias[i];
        }
        value.store(to + i * width);
      }
      if (to == padded) {
        std::memcpy(out, padded, cols * sizeof(Out));
      }
    }
  }

  const FloatTile& tile_;
  float* waiting_;  // [kFloatRows, kTileCols, width]
  float* sums_;  // [kFloatRows, kTileCols]
  int8_t* padded_;  // [kStrip, piece]
};

template <class Vec>
void float_product(const FloatTile& tile) {
  FloatProduct<Vec>(tile).run();
}

}  // namespace
}  // namespace int8compile
