// The provider for x86 with AMX int8 tiles (Sapphire Rapids and later).
//
// A tile holds 16 rows of 64 bytes, and one instruction adds to a 16 x 16 tile of int32 sums the product of 16 rows of
// 64 codes with 64 rows of 16, the latter arranged four rows to a row of the tile. That arrangement is wanted of one
// operand only. It is the activation's: its codes are packed once a call, while the weight, the other operand, is read
// from its row-major storage. So the sums come out transposed, 16 columns by 16 rows of the output, and are turned
// (transpose.h) into the tile that `finish` takes.
//
//   packed activation  [16 rows at a time][fragment of 64 codes along K][group of four][row][4]: 1 KB a fragment
//   K % 64             the last fragment of a row of the weight is its last 64 codes, wherever those begin, so nothing
//                      is read beyond it; the activation's has zeros for the codes that are in the fragment before
//   N % 16             tiles configured with fewer rows
//   M % 16             rows of zeros in the packed activation
//   few rows           the dot products of avx512vnni.cpp: the weight's codes come from memory no faster than those.
//                      (K < 64 too, of which there is no fragment)
//
// What bounds it: a product of tiles takes 16 cycles, and a load of one 8 from L1 and about 20 from L2. A block of 2 x 2
// tiles of sums does four products for four loads: 64 cycles, with 32 of loads where all come from L1, 56 where half
// does. So K is cut such that a block's activation (32 rows of kDepth fragments, contiguous) and as much of the weight
// stay in L1 while the columns go by: 44 KB of 48. (Not the other way round: rows of the weight that are a multiple of
// 2048 bytes apart share a few sets of L1.) The price is to put down and take up 4 KB of sums a block, whose cost shrinks
// with the depth. The latency of a product is 52 cycles, so at least four chains of sums are wanted; up to 16 rows there
// is one tile of the activation, and three chains of sums are no bound where the weight comes from memory.

#include "kernels.h"
#include "plan.h"
#include "target.h"

#if INT8COMPILE_X86_2021

#include <immintrin.h>

#include <cstdint>
#include <cstring>

INT8COMPILE_TARGET("avx512f,avx512bw,avx512vl,amx-tile,amx-int8")

#include "transpose.h"

namespace int8compile {
namespace {

constexpr int64_t kTile = 16;  // rows
constexpr int64_t kFragment = 64;  // codes along K
constexpr int64_t kTileBytes = kTile * kFragment;
constexpr int64_t kDepth = 11;  // fragments
constexpr int64_t kColTiles = kTileCols / kTile;
static_assert(kPackRows == kTile && kTileRows % (2 * kTile) == 0 && kTileCols % kTile == 0, "tiles fit");

int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// What ldtilecfg reads. Tiles: 0-3 sums, 4-6 the weight (6 where the activation has one), 7 and 6 the activation.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the CPU has it");

// For `cols` columns of the weight a tile, up to 16.
constexpr TileConfig config_of(int64_t cols) {
  TileConfig config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = kFragment;
    config.rows[i] = uint8_t(i < 6 ? cols : kTile);
  }
  return config;
}

struct TileConfigs {
  TileConfig of_cols[kTile + 1];

  constexpr TileConfigs() : of_cols() {
    for (int64_t cols = 1; cols <= kTile; ++cols) {
      of_cols[cols] = config_of(cols);
    }
  }
};

// Constants, since compilers think that ldtilecfg reads eight bytes and may leave out a store to the others.
constexpr TileConfigs kConfigs;

void configure(int64_t cols) {
  _tile_loadconfig(&kConfigs.of_cols[cols]);
}

void begin() {
  configure(kTile);
}

// Other code finds the tiles as at the start of the process, and the operating system need not save them.
void end() {
  _tile_release();
}

// A block of up to 2 x 2 or 3 x 1 tiles of sums, over the fragments [begin, end) along K.
struct Block {
  const int8_t* weight;  // the block's first column
  int64_t stride;
  const int8_t* packed;  // its first row
  int64_t packed_stride;  // from one tile of rows to the next
  int64_t k, begin, end;
  const int8_t* next;  // a weight that is needed soon, or null
  int32_t* parts;  // [tile of rows][kColTiles][16][16], transposed
};

int32_t* part(const Block& block, int64_t col_tile, int64_t row_tile) {
  return block.parts + (row_tile * kColTiles + col_tile) * kTile * kTile;
}

// Tile col_tile + 2 * row_tile has the sums; the numbers of tiles are part of the instructions.
template <int cols, int rows>
inline void take_up(const Block& block) {
  constexpr int64_t stride = kTile * sizeof(int32_t);
  if (block.begin == 0) {
    _tile_zero(0);
    if constexpr (cols > 1) _tile_zero(1);
    if constexpr (cols > 2 || rows > 1) _tile_zero(2);
    if constexpr (cols > 1 && rows > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, part(block, 0, 0), stride);
    if constexpr (cols > 1) _tile_loadd(1, part(block, 1, 0), stride);
    if constexpr (cols > 2) _tile_loadd(2, part(block, 2, 0), stride);
    if constexpr (rows > 1) _tile_loadd(2, part(block, 0, 1), stride);
    if constexpr (cols > 1 && rows > 1) _tile_loadd(3, part(block, 1, 1), stride);
  }
}

template <int cols, int rows>
inline void put_down(const Block& block) {
  constexpr int64_t stride = kTile * sizeof(int32_t);
  _tile_stored(0, part(block, 0, 0), stride);
  if constexpr (cols > 1) _tile_stored(1, part(block, 1, 0), stride);
  if constexpr (cols > 2) _tile_stored(2, part(block, 2, 0), stride);
  if constexpr (rows > 1) _tile_stored(2, part(block, 0, 1), stride);
  if constexpr (cols > 1 && rows > 1) _tile_stored(3, part(block, 1, 1), stride);
}

template <int cols, int rows>
void multiply_block(const Block& block) {
  static_assert((cols <= 3 && rows == 1) || (cols <= 2 && rows == 2), "there are eight tiles");
  take_up<cols, rows>(block);
  for (int64_t i = block.begin; i < block.end; ++i) {
    const int64_t at = (i + 1) * kFragment <= block.k ? i * kFragment : block.k - kFragment;
    const int8_t* weight = block.weight + at;
    const int8_t* packed = block.packed + i * kTileBytes;
    if (block.next != nullptr) {
      for (int64_t n = 0; n < cols * kTile; ++n) {  // (past the end of the weight that is harmless)
        _mm_prefetch(reinterpret_cast<const char*>(block.next + n * block.stride + at), _MM_HINT_T1);
      }
    }
    _tile_loadd(7, packed, kFragment);
    _tile_loadd(4, weight, block.stride);
    _tile_dpbssd(0, 4, 7);
    if constexpr (cols > 1) {
      _tile_loadd(5, weight + kTile * block.stride, block.stride);
      _tile_dpbssd(1, 5, 7);
    }
    if constexpr (cols > 2) {
      _tile_loadd(6, weight + 2 * kTile * block.stride, block.stride);
      _tile_dpbssd(2, 6, 7);
    }
    if constexpr (rows > 1) {
      _tile_loadd(6, packed + block.packed_stride, kFragment);
      _tile_dpbssd(2, 4, 6);
      if constexpr (cols > 1) {
        _tile_dpbssd(3, 5, 6);
      }
    }
  }
  put_down<cols, rows>(block);
}

void multiply_block(int64_t cols, int64_t rows, const Block& block) {
  if (rows == 1) {
    cols == 1 ? multiply_block<1, 1>(block) : cols == 2 ? multiply_block<2, 1>(block) : multiply_block<3, 1>(block);
  } else {
    cols == 1 ? multiply_block<1, 2>(block) : multiply_block<2, 2>(block);
  }
}

// Parts of sums between blocks of K: as large as the sums of a tile of the output.
__attribute__((noinline)) int32_t* parts_of_thread() {
  alignas(64) static thread_local int32_t parts[kTileRows * kTileCols];
  return parts;
}

struct Product {
  Codes a, b;
  int64_t rows, cols, k;
  int32_t* sums;
  int32_t* parts;

  // Two tiles of rows, or the last one, by `col_tiles` of columns over the fragments [begin, end).
  void multiply(
      int64_t row_tile, int64_t col_tile, int64_t col_tiles, int64_t begin, int64_t end, const int8_t* next) const {
    Block block;
    block.weight = b.data + col_tile * kTile * b.stride;
    block.stride = b.stride;
    block.packed_stride = kTile * a.stride;
    block.packed = a.data + row_tile * block.packed_stride;
    block.k = k;
    block.begin = begin;
    block.end = end;
    block.next = next;
    block.parts = parts + (row_tile * kColTiles + col_tile) * kTile * kTile;
    const int64_t row_tiles = rows - row_tile * kTile <= kTile ? 1 : 2;
    multiply_block(col_tiles, row_tiles, block);
    if (end * kFragment < k) {
      return;
    }
    for (int64_t j = 0; j < row_tiles; ++j) {
      const int64_t row = (row_tile + j) * kTile, here = rows - row < kTile ? rows - row : kTile;
      for (int64_t i = 0; i < col_tiles; ++i) {
        transpose(
            part(block, i, j), kTile * sizeof(int32_t), sums + row * kTileCols + (col_tile + i) * kTile,
            kTileCols * sizeof(int32_t), here);
      }
    }
  }

  // All of it over the fragments [begin, end).
  void multiply(int64_t begin, int64_t end) const {
    const int64_t row_tiles = divide_up(rows, kTile), col_tiles = cols / kTile, wide = row_tiles == 1 ? 3 : 2;
    for (int64_t row = 0; row < row_tiles; row += 2) {
      for (int64_t col = 0; col < col_tiles; col += wide) {
        const int64_t here = col_tiles - col < wide ? col_tiles - col : wide, after = (col + here) * kTile;
        // The first rows ask for the columns after these or, at the end, for the first ones' further codes.
        const int8_t* next = after < cols || end * kFragment >= k ? b.data + after * b.stride
                                                                  : b.data + (end - begin) * kFragment;
        multiply(row, col, here, begin, end, row == 0 ? next : nullptr);
      }
    }
    if (cols % kTile != 0) {
      configure(cols % kTile);
      for (int64_t row = 0; row < row_tiles; row += 2) {
        multiply(row, col_tiles, 1, begin, end, nullptr);
      }
      configure(kTile);
    }
  }
};

void amx_product(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
  const Product product = {a, b, rows, cols, k, sums, parts_of_thread()};
  const int64_t fragments = divide_up(k, kFragment);
  const int64_t depth = divide_up(fragments, divide_up(fragments, kDepth));  // as even as can be
  for (int64_t begin = 0; begin < fragments; begin += depth) {
    product.multiply(begin, fragments - begin < depth ? fragments : begin + depth);
  }
}

void pack(Codes a, int64_t rows, int64_t k, int8_t* packed) {
  for (int64_t at = 0; at < k; at += kFragment, packed += kTileBytes) {
    const int8_t* from = a.data + at;
    if (rows == kTile && at + kFragment <= k) {
      transpose(from, a.stride, packed, kFragment);
      continue;
    }
    const int64_t count = k - at < kFragment ? k - at : kFragment;
    int8_t padded[kTileBytes] = {};
    for (int64_t row = 0; row < rows; ++row) {
      std::memcpy(padded + (row + 1) * kFragment - count, from + row * a.stride, count);
    }
    transpose(padded, kFragment, packed, kFragment);
  }
}

int64_t row_bytes(int64_t k) {
  return divide_up(k, kFragment) * kFragment;
}

constexpr Packing kPacking = {row_bytes, pack, begin, end};

}  // namespace

INT8COMPILE_TARGET_END

const Kernels* amx_kernels() {
  static const Kernels table = [] {
    Kernels made = *avx512vnni_kernels();
    made.name = "amx";
    made.multipliers = made.multipliers.with(Method::amx, {amx_product, &kPacking, kFragment});
    made.method = amx_method;
    return made;
  }();
  return &table;
}

}  // namespace int8compile

#else

const int8compile::Kernels* int8compile::amx_kernels() {
  return nullptr;
}

#endif
