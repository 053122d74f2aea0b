// The exact int32 product of an int8 tile with many rows, by dot products of unsigned with signed bytes (vpdpbusd).
//
// As in vnni.h the weight is the unsigned operand, shifted by flipping its sign bit, and the sums of a row begin at what
// takes the shift off. There the dot products run along K and end in horizontal sums; here columns are the lanes of a
// register, 16 (AVX512) or 8, so there are none. For that the weight is packed, a panel of up to three registers at a time:
//
//   panel [K / 4][registers][16 or 8 columns][4 codes]
//
// and each row of the activation, which stays row-major, is read four codes at a time, broadcast to all columns. A panel
// is packed once a tile and serves all its rows, which has to pay for packing (plan.cpp). It is as deep as it can be
// and stay in L1, where all blocks of rows read it again.
//
// What bounds it: two dot products a cycle; 24 of them (12 with 16 registers) for three loads of the panel and eight (four)
// broadcasts.
//
// Of `Lanes` it takes what vnni.h names and panel_rows, the rows of a block; of_all(int32), load_sums(), store_sums(), and
// transpose<true>() in terms of its register.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "target.h"
#include "vnni.h"

namespace int8compile {
namespace {

constexpr int kPanelRegisters = 3;
constexpr int64_t kLane = 4;  // codes of a column in a register
constexpr int64_t kPanelBytes = 30720;  // of a 32 or 48 KB L1

template <class Lanes>
struct Panel {
  using Register = typename Lanes::Register;
  static constexpr int64_t columns = Lanes::width / kLane;  // of a register
  static constexpr int64_t most_deep = kPanelBytes / (kPanelRegisters * columns);  // codes along K

  // Out of line: where the address is known to be thread-local, compilers look it up again in every loop.
  __attribute__((noinline)) static int8_t* of_thread() {
    alignas(64) static thread_local int8_t panel[kPanelBytes];
    return panel;
  }

  // Register `index` of a panel of `registers`: up to 16 (8) columns of `k` codes; the rest of it is of no account.
  static void pack(Codes b, int64_t cols, int64_t k, int index, int registers, int8_t* panel) {
    const int64_t step = registers * Lanes::width;
    panel += index * Lanes::width;
    for (int64_t at = 0; at < k; at += Lanes::width, panel += step * columns) {
      const int64_t here = k - at < Lanes::width ? k - at : Lanes::width;
      if (here == Lanes::width && cols == columns) {
        for (int64_t n = 0; n < columns; ++n) {  // (past the end of the weight that is harmless)
          _mm_prefetch(reinterpret_cast<const char*>(b.data + n * b.stride + at + 4 * Lanes::width), _MM_HINT_T0);
        }
        transpose<true>(b.data + at, b.stride, panel, step);
        continue;
      }
      alignas(64) int8_t padded[columns * Lanes::width] = {};
      for (int64_t n = 0; n < cols; ++n) {
        std::memcpy(padded + n * Lanes::width, b.data + n * b.stride + at, here);
      }
      transpose<true>(padded, Lanes::width, panel, step, (here + kLane - 1) / kLane);
    }
  }

  static INT8COMPILE_INLINE int32_t four(const int8_t* from, int64_t count) {
    int32_t codes = 0;
    std::memcpy(&codes, from, count);
    return codes;
  }

  template <int rows, int registers>
  static INT8COMPILE_INLINE void step(
      const int8_t* const (&row)[rows], int64_t at, int64_t count, const int8_t* panel,
      Register (&acc)[rows][registers]) {
    Register w[registers];
    INT8COMPILE_UNROLL
    for (int i = 0; i < registers; ++i) {
      w[i] = Lanes::load(panel + i * Lanes::width);
    }
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Register q = Lanes::of_all(four(row[r] + at, count));
      INT8COMPILE_UNROLL
      for (int i = 0; i < registers; ++i) {
        Lanes::add_products(acc[r][i], w[i], q);
      }
    }
  }

  // sums = start + the product, with a start for each row, or sums += the product where that is null.
  template <int rows, int registers>
  __attribute__((noinline)) static void block(
      Codes a, int64_t k, const int8_t* panel, const int32_t* start, int32_t* sums) {
    const int8_t* row[rows];
    Register acc[rows][registers];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      row[r] = a.data + r * a.stride;
      INT8COMPILE_UNROLL
      for (int i = 0; i < registers; ++i) {
        acc[r][i] = start == nullptr ? Lanes::load_sums(sums + r * kTileCols + i * columns)
                                     : Lanes::of_all(start[r]);
      }
    }
    int64_t at = 0;
    for (; at + kLane <= k; at += kLane, panel += registers * Lanes::width) {
      step<rows, registers>(row, at, kLane, panel, acc);
    }
    if (at < k) {
      step<rows, registers>(row, at, k - at, panel, acc);
    }
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int i = 0; i < registers; ++i) {
        Lanes::store_sums(sums + r * kTileCols + i * columns, acc[r][i]);
      }
    }
  }

  template <int registers, int most = Lanes::panel_rows>
  static void some_rows(int64_t rows, Codes a, int64_t k, const int8_t* panel, const int32_t* start, int32_t* sums) {
    if constexpr (most > 1) {
      if (rows < most) {
        return some_rows<registers, most - 1>(rows, a, k, panel, start, sums);
      }
    }
    block<most, registers>(a, k, panel, start, sums);
  }

  static void all_rows(
      int registers, int64_t rows, int64_t row_block, Codes a, int64_t k, const int8_t* panel, const int32_t* start,
      int32_t* sums) {
    for (int64_t row = 0; row < rows; row += row_block) {
      const int64_t here = rows - row < row_block ? rows - row : row_block;
      const Codes codes = {a.data + row * a.stride, a.stride};
      const int32_t* first = start == nullptr ? nullptr : start + row;
      int32_t* to = sums + row * kTileCols;
      switch (registers) {
        case 1:
          some_rows<1>(here, codes, k, panel, first, to);
          break;
        case 2:
          some_rows<2>(here, codes, k, panel, first, to);
          break;
        default:
          some_rows<3>(here, codes, k, panel, first, to);
      }
    }
  }

  static void product(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
    int32_t start[kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      start[r] = Vnni<Lanes>::start_of(a, r, k);
    }
    // As even as can be: 9 rows as 5 + 4, not 8 + 1.
    const int64_t blocks = (rows + Lanes::panel_rows - 1) / Lanes::panel_rows, row_block = (rows + blocks - 1) / blocks;
    const int64_t pieces = (k + most_deep - 1) / most_deep;  // as even as can be, too
    const int64_t depth = pieces == 0 ? 0 : ((k + pieces - 1) / pieces + Lanes::width - 1) / Lanes::width * Lanes::width;
    int8_t* panel = of_thread();
    for (int64_t col = 0; col < cols; col += kPanelRegisters * columns) {
      const int64_t wide = cols - col < kPanelRegisters * columns ? cols - col : kPanelRegisters * columns;
      const int registers = int((wide + columns - 1) / columns);
      int64_t at = 0;
      do {  // once at least: the product is 0 where k is
        const int64_t deep = k - at < depth ? k - at : depth;
        for (int i = 0; i < registers; ++i) {
          const int64_t here = wide - i * columns < columns ? wide - i * columns : columns;
          pack({b.data + (col + i * columns) * b.stride + at, b.stride}, here, deep, i, registers, panel);
        }
        all_rows(
            registers, rows, row_block, {a.data + at, a.stride}, deep, panel, at == 0 ? start : nullptr, sums + col);
        at += depth;
      } while (at < k);
    }
  }
};

}  // namespace
}  // namespace int8compile
