// The exact int32 product of int8 tiles by dot products of unsigned with signed bytes (x86's vpdpbusd).
//
// The weight is the unsigned operand, shifted by flipping its sign bit (w + 128) as it is loaded, and 128 times the row
// sum of the activation comes off at the end:
//
//   sum q (w + 128)  -  128 sum q  =  sum q w
//
// One exclusive or for a weight register that serves up to six rows, row sums once a call, no copy of either
// operand, and no code is an exception (-128 becomes 0). All of it is modulo 2^32, so the shifted sums may wrap.
//
// What bounds it: two dot products a cycle, as many as the loads that feed them, so a block of rows x cols
// accumulators reads each register it loads several times, and has the 10 or so chains of additions (2 a cycle, 5
// cycles each) that keep both ports busy. A block of rows of the activation stays in L1 while the weight streams by.
// With few rows the weight comes from memory: a block asks for the next one's codes, a cache line of each column a
// step.
//
// `Lanes` is a register of bytes: `width`, zero(), load(), load_first(count), flip_sign(), add_products(), and sums()
// of the int32 lanes of four registers. block_cols(rows) is the number of columns of a block.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "kernels.h"
#include "target.h"

namespace int8compile {
namespace {

constexpr int64_t kBlockRows = 6;
constexpr int64_t kBlockCodes = 24576;  // of the activation: half of a 48 KB L1

template <class Lanes>
struct Vnni {
  using Register = typename Lanes::Register;

  static Register load(const int8_t* from, int64_t count) {
    return count == Lanes::width ? Lanes::load(from) : Lanes::load_first(from, count);
  }

  // acc += the products of `count` codes along K.
  template <int rows, int cols>
  static INT8COMPILE_INLINE void step(Codes a, Codes b, int64_t count, Register (&acc)[rows][cols]) {
    if constexpr (rows < cols) {  // the operand with fewer registers is held
      Register q[rows];
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        q[r] = load(a.data + r * a.stride, count);
      }
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        const Register w = Lanes::flip_sign(load(b.data + n * b.stride, count));
        INT8COMPILE_UNROLL
        for (int r = 0; r < rows; ++r) {
          Lanes::add_products(acc[r][n], w, q[r]);
        }
      }
    } else {
      Register w[cols];
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        w[n] = Lanes::flip_sign(load(b.data + n * b.stride, count));
      }
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Register q = load(a.data + r * a.stride, count);
        INT8COMPILE_UNROLL
        for (int n = 0; n < cols; ++n) {
          Lanes::add_products(acc[r][n], w[n], q);
        }
      }
    }
  }

  // Four registers at a time to four sums.
  template <int rows, int cols>
  static INT8COMPILE_INLINE void put_sums(const Register (&acc)[rows][cols], const int32_t* start, int32_t* sums) {
    constexpr int count = rows * cols;
    Register each[(count + 3) / 4 * 4];
    INT8COMPILE_UNROLL
    for (int i = 0; i < (count + 3) / 4 * 4; ++i) {
      each[i] = i < count ? acc[i % count / cols][i % cols] : Lanes::zero();
    }
    INT8COMPILE_UNROLL
    for (int i = 0; i < count; i += 4) {
      const __m128i total = Lanes::sums(each[i], each[i + 1], each[i + 2], each[i + 3]);
      if constexpr (cols % 4 == 0) {
        auto* to = reinterpret_cast<__m128i*>(sums + i / cols * kTileCols + i % cols);
        const __m128i before = start == nullptr ? _mm_loadu_si128(to) : _mm_set1_epi32(start[i / cols]);
        _mm_storeu_si128(to, _mm_add_epi32(before, total));
      } else {
        uint32_t lanes[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), total);
        for (int j = i; j < i + 4 && j < count; ++j) {
          int32_t& sum = sums[j / cols * kTileCols + j % cols];
          sum = int32_t(uint32_t(start == nullptr ? sum : start[j / cols]) + lanes[j - i]);
        }
      }
    }
  }

  // sums = start + the product, with a start for each row, or sums += the product where that is null.
  template <int rows, int cols>
  static void block(Codes a, Codes b, int64_t k, const int32_t* start, int32_t* sums) {
    Register acc[rows][cols];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        acc[r][n] = Lanes::zero();
      }
    }
    int64_t at = 0;
    for (; at + Lanes::width <= k; at += Lanes::width) {
      if (Lanes::width == 64 || at % 64 == 0) {
        INT8COMPILE_UNROLL
        for (int n = 0; n < cols; ++n) {  // (past the end of the weight that is harmless)
          _mm_prefetch(reinterpret_cast<const char*>(b.data + (cols + n) * b.stride + at), _MM_HINT_T0);
        }
      }
      step<rows, cols>({a.data + at, a.stride}, {b.data + at, b.stride}, Lanes::width, acc);
    }
    if (at < k) {
      step<rows, cols>({a.data + at, a.stride}, {b.data + at, b.stride}, k - at, acc);
    }
    put_sums(acc, start, sums);
  }

  template <int rows>
  static void block_rows(Codes a, Codes b, int64_t cols, int64_t k, const int32_t* start, int32_t* sums) {
    constexpr int wide = Lanes::block_cols(rows);
    int64_t n = 0;
    for (; n + wide <= cols; n += wide) {
      block<rows, wide>(a, {b.data + n * b.stride, b.stride}, k, start, sums + n);
    }
    for (; n < cols; ++n) {
      block<rows, 1>(a, {b.data + n * b.stride, b.stride}, k, start, sums + n);
    }
  }

  static void some_rows(
      int64_t rows, Codes a, Codes b, int64_t cols, int64_t k, const int32_t* start, int32_t* sums) {
    switch (rows) {
      case 1:
        return block_rows<1>(a, b, cols, k, start, sums);
      case 2:
        return block_rows<2>(a, b, cols, k, start, sums);
      case 3:
        return block_rows<3>(a, b, cols, k, start, sums);
      case 4:
        return block_rows<4>(a, b, cols, k, start, sums);
      case 5:
        return block_rows<5>(a, b, cols, k, start, sums);
      default:
        return block_rows<6>(a, b, cols, k, start, sums);
    }
  }

  // What takes the shift off: -128 times the sum of a row, modulo 2^32.
  static int32_t start_of(Codes a, int64_t row, int64_t k) {
    const int32_t sum = a.row_sums != nullptr ? a.row_sums[row] : row_sum(a.data + row * a.stride, k);
    return int32_t(uint32_t(sum) * -128u);
  }

  static int32_t row_sum(const int8_t* q, int64_t k) {
    const Register ones = Lanes::ones();
    Register acc = Lanes::zero();
    int64_t at = 0;
    for (; at + Lanes::width <= k; at += Lanes::width) {
      Lanes::add_products(acc, ones, Lanes::load(q + at));
    }
    if (at < k) {
      Lanes::add_products(acc, ones, Lanes::load_first(q + at, k - at));
    }
    const Register zero = Lanes::zero();
    return _mm_cvtsi128_si32(Lanes::sums(acc, zero, zero, zero));
  }

  static void product(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
    // As even as can be: 8 rows as 4 + 4, not 6 + 2.
    const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows, row_block = (rows + blocks - 1) / blocks;
    const int64_t depth = kBlockCodes / row_block / 64 * 64;
    for (int64_t row = 0; row < rows; row += row_block) {
      const int64_t here = rows - row < row_block ? rows - row : row_block;
      const int8_t* codes = a.data + row * a.stride;
      int32_t start[kBlockRows];
      for (int64_t r = 0; r < here; ++r) {
        start[r] = start_of(a, row + r, k);
      }
      int64_t at = 0;
      do {  // once at least: the product is 0 where k is
        const int64_t deep = k - at < depth ? k - at : depth;
        some_rows(
            here, {codes + at, a.stride}, {b.data + at, b.stride}, cols, deep, at == 0 ? start : nullptr,
            sums + row * kTileCols);
        at += depth;
      } while (at < k);
    }
  }
};

}  // namespace
}  // namespace int8compile
