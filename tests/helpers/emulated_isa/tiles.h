// AMX: tiles, their configuration, and every check that a CPU makes before it touches them.

#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "registers.h"

namespace emulated {

struct Tiles {
  bool configured = false;
  int rows[8] = {}, row_bytes[8] = {};
  uint8_t data[8][16][64] = {};

  void use(int tile) const {
    require(configured, "#UD: a tile is used before ldtilecfg");
    require(tile >= 0 && tile < 8, "there are eight tiles");
    require(rows[tile] > 0 && row_bytes[tile] > 0, "#UD: a tile is used that has no size");
  }
};

// A thread's, as the registers are.
inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}

}  // namespace emulated

inline void _tile_release() {
  emulated::tiles() = emulated::Tiles();
}

inline void _tile_loadconfig(const void* from) {
  using emulated::require;
  uint8_t bytes[64];
  std::memcpy(bytes, from, sizeof(bytes));
  emulated::Tiles made;
  require(bytes[0] <= 1, "#GP: ldtilecfg: no such palette");
  made.configured = bytes[0] == 1;
  require(bytes[1] == 0, "ldtilecfg: start_row is for restarting an instruction");
  for (int i = 2; i < 16; ++i) {
    require(bytes[i] == 0, "#GP: ldtilecfg: a reserved byte is set");
  }
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    require(i < 8 || (rows == 0 && row_bytes == 0), "#GP: ldtilecfg: palette 1 has eight tiles");
    require(rows <= 16, "#GP: ldtilecfg: a tile has up to 16 rows");
    require(row_bytes <= 64, "#GP: ldtilecfg: a tile's row has up to 64 bytes");
    require((rows == 0) == (row_bytes == 0), "#GP: ldtilecfg: a tile of rows or columns alone");
    if (i < 8) {
      made.rows[i] = rows;
      made.row_bytes[i] = row_bytes;
    }
  }
  emulated::tiles() = made;
}

inline void _tile_zero(int tile) {
  emulated::tiles().use(tile);
  std::memset(emulated::tiles().data[tile], 0, sizeof(emulated::tiles().data[tile]));
}

inline void _tile_loadd(int tile, const void* from, long stride) {
  emulated::Tiles& t = emulated::tiles();
  _tile_zero(tile);
  for (int row = 0; row < t.rows[tile]; ++row) {
    std::memcpy(t.data[tile][row], static_cast<const char*>(from) + row * stride, t.row_bytes[tile]);
  }
}

inline void _tile_stored(int tile, void* to, long stride) {
  emulated::Tiles& t = emulated::tiles();
  t.use(tile);
  for (int row = 0; row < t.rows[tile]; ++row) {
    std::memcpy(static_cast<char*>(to) + row * stride, t.data[tile][row], t.row_bytes[tile]);
  }
}

// c [m][n] of int32 += a [m][4 k] of int8 times b [k][4 n] of int8, four rows of the right operand to a row of b.
inline void _tile_dpbssd(int c, int a, int b) {
  emulated::Tiles& t = emulated::tiles();
  for (int tile : {c, a, b}) {
    t.use(tile);
    emulated::require(t.row_bytes[tile] % 4 == 0, "#UD: tdpbssd: a row is no whole number of int32");
  }
  emulated::require(a != b && a != c && b != c, "#UD: tdpbssd: the same tile twice");
  emulated::require(t.rows[c] == t.rows[a], "#UD: tdpbssd: rows of the sums and of the left operand differ");
  emulated::require(t.row_bytes[c] == t.row_bytes[b], "#UD: tdpbssd: columns of the sums and of the right operand differ");
  emulated::require(t.row_bytes[a] / 4 == t.rows[b], "#UD: tdpbssd: the operands' common dimensions differ");
  for (int m = 0; m < t.rows[c]; ++m) {
    uint32_t sums[16];
    std::memcpy(sums, t.data[c][m], sizeof(sums));
    for (int k = 0; k < t.row_bytes[a]; ++k) {
      const int32_t left = int8_t(t.data[a][m][k]);
      for (int n = 0; n < t.row_bytes[c] / 4; ++n) {
        sums[n] += uint32_t(left * int32_t(int8_t(t.data[b][k / 4][4 * n + k % 4])));
      }
    }
    std::memcpy(t.data[c][m], sums, t.row_bytes[c]);
  }
}
