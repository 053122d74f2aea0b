// Attention's two products for few rows, such as one token's: keys and values are read as they lie.
//
// Packing them, which many rows pay for, costs as much as eight rows' products. A score is a dot product along a head's
// width, in as many parts as a vector has lanes; four keys at a time, whose parts are added up together. For each row the
// order of additions is the same whatever the other rows are.
//
// What bounds it, with 16-bit keys of width 64 and three rows: 14 cycles a key and 10 a value, of which a third is making
// floats of them.

#pragma once

#include <cstdint>

#include "attention.h"
#include "softmax.h"
#include "target.h"

namespace int8compile {
namespace {

template <class Vec, class T>
struct Few {
  static constexpr int most_rows = Vec::registers >= 32 ? 4 : 2;  // times four columns are the accumulators

  struct Operands {
    const float* rows;
    int64_t row_stride;
    const T* from;  // keys or values
    int64_t stride;
    int64_t keys, width;
    float* to;
    int64_t to_stride;
  };

  // to [rows, keys rounded up to fours] = rows [rows, width] . keys [keys, width]; `rows` has zeros up to whole vectors.
  static void scores(int64_t rows, const Operands& o) {
    in_blocks(rows, o, [](auto count, const Operands& part) { scores_of<decltype(count)::value>(part); });
  }

  // to [rows, width] = alpha [rows] to + rows [rows, keys] values [keys, width]; `to` has whole vectors.
  static void add_values(int64_t rows, const Operands& o, const float* alpha) {
    in_blocks(rows, o, [&](auto count, const Operands& part) {
      add_values_to<decltype(count)::value>(part, alpha + (part.rows - o.rows) / o.row_stride);
    });
  }

 private:
  template <int rows>
  struct Count {
    static constexpr int value = rows;
  };

  // body(Count, operands) for up to most_rows rows at a time.
  template <class Body>
  static INT8COMPILE_INLINE void in_blocks(int64_t rows, Operands o, Body body) {
    for (; rows > 0; rows -= most_rows, o.rows += most_rows * o.row_stride, o.to += most_rows * o.to_stride) {
      if (rows >= 4 && most_rows == 4) {
        body(Count<most_rows>(), o);
      } else if (rows == 3 && most_rows == 4) {
        body(Count<most_rows == 4 ? 3 : 2>(), o);
      } else if (rows >= 2) {
        body(Count<2>(), o);
      } else {
        body(Count<1>(), o);
      }
    }
  }

  template <int rows>
  __attribute__((noinline)) static void scores_of(const Operands& o) {
    for (int64_t key = 0; key < o.keys; key += 4) {
      const T* from[4];
      INT8COMPILE_UNROLL
      for (int i = 0; i < 4; ++i) {  // behind the last key it again
        from[i] = o.from + (key + i < o.keys ? key + i : o.keys - 1) * o.stride;
      }
      Vec acc[rows][4];
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        INT8COMPILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          acc[r][i] = Vec::all(0.0f);
        }
      }
      for (int64_t at = 0; at < o.width; at += Vec::width) {
        Vec keys[4];
        INT8COMPILE_UNROLL
        for (int i = 0; i < 4; ++i) {
          keys[i] = load_some<Vec>(from[i] + at, o.width - at);
        }
        INT8COMPILE_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Vec row = Vec::load(o.rows + r * o.row_stride + at);
          INT8COMPILE_UNROLL
          for (int i = 0; i < 4; ++i) {
            acc[r][i] = acc[r][i].plus_product(row, keys[i]);
          }
        }
      }
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        Vec::store_sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3], o.to + r * o.to_stride + key);
      }
    }
  }

  template <int rows>
  static INT8COMPILE_INLINE void add_values_to(const Operands& o, const float* alpha) {
    int64_t at = 0;
    for (; at + 4 * Vec::width <= o.width; at += 4 * Vec::width) {
      add_columns<rows, 4>(o, alpha, at);
    }
    for (; at < o.width; at += Vec::width) {
      add_columns<rows, 1>(o, alpha, at);
    }
  }

  template <int rows, int vecs>
  __attribute__((noinline)) static void add_columns(const Operands& o, const float* alpha, int64_t at) {
    Vec acc[rows][vecs];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        acc[r][i] = Vec::load(o.to + r * o.to_stride + at + i * Vec::width) * Vec::all(alpha[r]);
      }
    }
    const T* from = o.from + at;
    for (int64_t key = 0; key < o.keys; ++key, from += o.stride) {
      Vec values[vecs];
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        values[i] = vecs > 1 ? Vec::load(from + i * Vec::width) : load_some<Vec>(from, o.width - at);
      }
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Vec weight = Vec::all(o.rows[r * o.row_stride + key]);
        INT8COMPILE_UNROLL
        for (int i = 0; i < vecs; ++i) {
          acc[r][i] = acc[r][i].plus_product(weight, values[i]);
        }
      }
    }
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        acc[r][i].store(o.to + r * o.to_stride + at + i * Vec::width);
      }
    }
  }
};

}  // namespace
}  // namespace int8compile
