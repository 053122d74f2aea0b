// The exact int32 product of int8 tiles for instruction sets that multiply 16-bit integers in pairs (x86's vpmaddwd).
//
// Both operands have K as their contiguous dimension, so dot products run along K and nothing is transposed. Codes are
// widened to int16 in chunks of 16 along K:
//
//   activation  `rows` rows at a time into a panel that stays in L1, [chunk][row][16]
//   weight      of few rows of the activation: not at all, the micro-kernel widens the codes as it loads them;
//               of many: a tile into a panel in L2, [col][k], from which every row block then loads faster
//
// Reading codes unpacked must not run past the end of the tensor. The last K % 16 codes are therefore multiplied in a
// chunk that ends with them, and the activation's panel has zeros for the codes of that chunk that are done already.
//
// A `Micro` has `max_rows`, and `template <int rows, class Code> run(panel, weight, stride, cols, chunks, last, add,
// sums)`, which sets (or, with `add`, increases) sums [rows, kTileCols]: `chunks` chunks at weight + 16 * chunk, then
// one at weight + last unless that is kNone (it may be negative: codes before the tile's first).

#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace int8compile {
namespace {

constexpr int64_t kChunk = 16;
constexpr int64_t kRowPanel = 8192;  // int16 codes: half of a 32 KB L1
constexpr int64_t kColPanelDepth = 1040;  // along K, of kTileCols columns: 200 KB of a 512 KB L2
constexpr int64_t kPackFromRows = 96;  // measured on Zen 3: below, filling the column panel costs more than it saves
constexpr int64_t kNone = INT64_MIN;

struct Panels {
  alignas(64) int16_t rows[kRowPanel + 6 * kChunk];
  alignas(64) int16_t cols[kTileCols * kColPanelDepth];
};

// Out of line: where the address is known to be thread-local, compilers look it up again in every micro-kernel.
__attribute__((noinline)) Panels& panels_of_thread() {
  static thread_local Panels panels;
  return panels;
}

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline void widen(const int8_t* from, int64_t count, int16_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
  }
}

inline void widen_chunk(const int8_t* from, int16_t* to) {
  for (int64_t i = 0; i < kChunk; ++i) {
    to[i] = from[i];
  }
}

// A [rows, k] block into panel[chunk][row][16]. The last k % 16 codes stand at the end of their chunk if `at_end`,
// with zeros before them, and otherwise at its start, with zeros behind.
inline void fill_row_panel(Codes a, int64_t rows, int64_t k, bool at_end, int16_t* panel) {
  const int64_t chunks = k / kChunk, rest = k % kChunk;
  for (int64_t r = 0; r < rows; ++r) {
    const int8_t* from = a.data + r * a.stride;
    int16_t* to = panel + r * kChunk;
    for (int64_t c = 0; c < chunks; ++c) {
      widen_chunk(from + c * kChunk, to + c * rows * kChunk);
    }
    if (rest > 0) {
      to += chunks * rows * kChunk;
      std::memset(to, 0, kChunk * sizeof(int16_t));
      widen(from + chunks * kChunk, rest, at_end ? to + kChunk - rest : to);
    }
  }
}

// A [cols, k] block into panel[col][k rounded up to 16].
inline void fill_col_panel(Codes b, int64_t cols, int64_t k, int16_t* panel) {
  const int64_t depth = divide_up(k, kChunk) * kChunk;
  for (int64_t n = 0; n < cols; ++n) {
    const int8_t* from = b.data + n * b.stride;
    int16_t* to = panel + n * depth;
    for (int64_t c = 0; c < k / kChunk; ++c) {
      widen_chunk(from + c * kChunk, to + c * kChunk);
    }
    std::memset(to + k / kChunk * kChunk, 0, (depth - k / kChunk * kChunk) * sizeof(int16_t));
    widen(from + k / kChunk * kChunk, k % kChunk, to + k / kChunk * kChunk);
  }
}

template <class Micro, class Code>
inline void run_rows(
    int64_t rows, const int16_t* panel, const Code* weight, int64_t stride, int64_t cols, int64_t chunks, int64_t last,
    bool add, int32_t* sums) {
  switch (rows) {
    case 1:
      return Micro::template run<1>(panel, weight, stride, cols, chunks, last, add, sums);
    case 2:
      return Micro::template run<2>(panel, weight, stride, cols, chunks, last, add, sums);
    case 3:
      return Micro::template run<3>(panel, weight, stride, cols, chunks, last, add, sums);
    case 4:
      return Micro::template run<4>(panel, weight, stride, cols, chunks, last, add, sums);
    case 5:
      return Micro::template run<5>(panel, weight, stride, cols, chunks, last, add, sums);
    default:
      return Micro::template run<6>(panel, weight, stride, cols, chunks, last, add, sums);
  }
}

template <class Micro>
void widened_product(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
  Panels& panels = panels_of_thread();
  if (k == 0) {
    std::memset(sums, 0, rows * kTileCols * sizeof(int32_t));
    return;
  }
  const bool pack = rows >= kPackFromRows || k < kChunk;
  // As even as can be: 8 rows as 4 + 4, not 6 + 2.
  const int64_t row_block = divide_up(rows, divide_up(rows, Micro::max_rows));
  const int64_t deepest = pack ? kColPanelDepth : kRowPanel / row_block;
  const int64_t depth = divide_up(divide_up(k, divide_up(k, deepest)), kChunk) * kChunk;
  for (int64_t start = 0; start < k; start += depth) {
    const int64_t here = k - start < depth ? k - start : depth;
    if (pack) {
      fill_col_panel({b.data + start, b.stride}, cols, here, panels.cols);
    }
    for (int64_t row = 0; row < rows; row += row_block) {
      const int64_t block = rows - row < row_block ? rows - row : row_block;
      fill_row_panel({a.data + row * a.stride + start, a.stride}, block, here, !pack, panels.rows);
      int32_t* to = sums + row * kTileCols;
      if (pack) {
        const int64_t chunks = divide_up(here, kChunk);
        run_rows<Micro>(block, panels.rows, panels.cols, chunks * kChunk, cols, chunks, kNone, start > 0, to);
      } else {
        const int64_t last = here % kChunk == 0 ? kNone : here - kChunk;
        run_rows<Micro>(block, panels.rows, b.data + start, b.stride, cols, here / kChunk, last, start > 0, to);
      }
    }
  }
}

}  // namespace
}  // namespace int8compile
