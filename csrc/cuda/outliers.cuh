// The outlier product of a tile: which columns it has, their operands in shared memory, and the multiplication.
// epilogue.cuh has what comes after it.
//
// The columns are taken in chunks of 32 bytes of x's type (16 of 16 bits, or 8 of fp32): what the codes leave over of x
// in them, [rows of the tile, 32 bytes], and their weights, [columns of the tile, 32 bytes], as numbers of x's type,
// which hold int8 exactly. 16-bit chunks are then operands of mma; fp32 ones are multiplied in fp32. Any number of
// columns is right; the first `gathered.capacity` have been gathered once for all tiles by gather.cu.

#pragma once

#include "numbers.cuh"

namespace int8compile {

constexpr int kChunkBytes = 32;
constexpr int kChunkStride = 48;  // so that the rows an instruction reads lie in different banks
constexpr int kListed = 64;  // columns a block lists at a time
constexpr int kListScratch = 32;  // ints, one a warp

// Threads of a block that work together: all of it, or the ones that barrier `barrier` counts.
struct Group {
  int thread, threads, barrier;

  __device__ void sync() const {
    if (barrier == 0) {
      __syncthreads();
    } else {
      named_barrier(barrier, threads);
    }
  }
};

// Which of the 16 flags from `at` on are set, as bits.
__device__ inline unsigned flags_16(const uint8_t* flags, int64_t at, int64_t k) {
  unsigned bits = 0;
  if (at + 16 <= k && reinterpret_cast<uintptr_t>(flags + at) % 16 == 0) {
    const uint4 packed = *reinterpret_cast<const uint4*>(flags + at);
    if ((packed.x | packed.y | packed.z | packed.w) == 0) {
      return 0;
    }
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      bits |= (words[i / 4] >> (8 * (i % 4)) & 0xff) != 0 ? 1u << i : 0u;
    }
    return bits;
  }
  for (int i = 0; i < 16 && at + i < k; ++i) {
    bits |= flags[at + i] != 0 ? 1u << i : 0u;
  }
  return bits;
}

// The outlier columns of ranks first .. first + capacity - 1, ascending, to columns[0..]; returns how many there are in
// all. Called by all threads of the group, with `scratch` and `columns` in shared memory; ends with a barrier.
__device__ __forceinline__ int list_columns(
    const Group& group, const uint8_t* flags, int64_t k, int first, int capacity, int32_t* columns, int* scratch) {
  const int warp = group.thread / 32, lane = group.thread % 32;
  int total = 0;
  for (int64_t start = 0; start < k; start += int64_t(group.threads) * 16) {
    const int64_t at = start + int64_t(group.thread) * 16;
    unsigned bits = at < k ? flags_16(flags, at, k) : 0;
    const int mine = __popc(bits);
    int up_to_mine = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(0xffffffff, up_to_mine, distance);
      up_to_mine += lane >= distance ? other : 0;
    }
    if (lane == 31) {
      scratch[warp] = up_to_mine;
    }
    group.sync();
    int rank = total + up_to_mine - mine;
    for (int w = 0; w < group.threads / 32; ++w) {
      rank += w < warp ? scratch[w] : 0;
      total += scratch[w];
    }
    for (; bits != 0; bits &= bits - 1, ++rank) {
      if (rank >= first && rank < first + capacity) {
        columns[rank - first] = static_cast<int32_t>(at + __ffs(static_cast<int>(bits)) - 1);
      }
    }
    group.sync();  // the columns are there, and scratch is free again
  }
  return total;
}

// The outlier product of one tile, which starts at row0 and col0.
struct OutlierTile {
  const Activation& x;
  const Quantized& q;
  const Product& p;
  const Gathered& gathered;
  float residual_from;
  int64_t row0, col0;
  int rows, cols;  // a tile's, also where it reaches beyond the output
  // Shared memory.
  char* residual;  // [rows, kChunkStride bytes]
  char* weight;  // [cols, kChunkStride bytes]
  int32_t* columns;  // [kListed]
  int* scratch;  // [kListScratch]

  static constexpr int shared_bytes(int rows, int cols) {
    return (rows + cols) * kChunkStride + (kListed + kListScratch) * 4;
  }

  __device__ OutlierTile(
      const Activation& x, const Quantized& q, const Product& p, const Gathered& gathered, float residual_from,
      int64_t row0, int64_t col0, int rows, int cols, char* shared)
      : x(x), q(q), p(p), gathered(gathered), residual_from(residual_from), row0(row0), col0(col0), rows(rows),
        cols(cols), residual(shared), weight(shared + rows * kChunkStride),
        columns(reinterpret_cast<int32_t*>(shared + (rows + cols) * kChunkStride)), scratch(columns + kListed) {}

  __device__ int chunk() const {
    return x.type == Float::f32 ? 8 : 16;
  }

  __device__ void put(char* row, int t, float value) const {
    if (x.type == Float::f32) {
      reinterpret_cast<float*>(row)[t] = value;
    } else {
      reinterpret_cast<uint16_t*>(row)[t] = to_16_bits(value, x.type);
    }
  }

  // How many columns there are. Without gathered ones this lists the first of them.
  __device__ __forceinline__ int begin(const Group& group) const {
    if (q.flags == nullptr) {
      return 0;
    }
    return gathered.capacity > 0 ? *gathered.count : list_columns(group, q.flags, x.k, 0, kListed, columns, scratch);
  }

  // Puts chunk t0 .. of `count` columns into shared memory; ends with a barrier. Chunks are asked for in order.
  __device__ __forceinline__ void stage(const Group& group, int t0, int count) const {
    if (t0 < gathered.capacity) {
      stage_gathered(group, t0);
    } else {
      const int listed = (t0 - gathered.capacity) % kListed;
      if (listed == 0 && t0 > 0) {
        list_columns(group, q.flags, x.k, t0, kListed, columns, scratch);
      }
      stage_listed(group, columns + listed, count - t0);
    }
    group.sync();
  }

  __device__ __forceinline__ void stage_gathered(const Group& group, int t0) const {
    const int64_t row_bytes = int64_t(gathered.capacity) * (kChunkBytes / chunk());
    for (int i = group.thread; i < rows * 2; i += group.threads) {
      const int row = i / 2, half = i % 2;
      uint4 values = make_uint4(0, 0, 0, 0);
      if (row0 + row < x.rows) {
        values = *reinterpret_cast<const uint4*>(
            static_cast<const char*>(gathered.residual) + (row0 + row) * row_bytes + t0 * (kChunkBytes / chunk()) +
            half * 16);
      }
      *reinterpret_cast<uint4*>(residual + row * kChunkStride + half * 16) = values;
    }
    const int words = chunk() / 4;
    for (int i = group.thread; i < cols * words; i += group.threads) {
      const int col = i / words, word = i % words;
      uint32_t codes = 0;
      if (col0 + col < p.cols) {
        codes = *reinterpret_cast<const uint32_t*>(
            gathered.weight + (col0 + col) * gathered.capacity + t0 + word * 4);
      }
      for (int j = 0; j < 4; ++j) {
        put(weight + col * kChunkStride, word * 4 + j, static_cast<float>(static_cast<int8_t>(codes >> (8 * j))));
      }
    }
  }

  __device__ __forceinline__ void stage_listed(const Group& group, const int32_t* listed, int count) const {
    const int size = chunk();
    for (int i = group.thread; i < rows * size; i += group.threads) {
      const int64_t row = row0 + i / size;
      const int t = i % size;
      float value = 0.0f;
      if (t < count && row < x.rows) {
        const int64_t at = row * x.k + listed[t];
        value = residual_of(load_float(x.data, x.type, at), q.row_scale[row], q.codes[at], residual_from);
      }
      put(residual + i / size * kChunkStride, t, value);
    }
    for (int i = group.thread; i < cols * size; i += group.threads) {
      const int64_t col = col0 + i / size;
      const int t = i % size;
      const bool there = t < count && col < p.cols;
      const int8_t code = there ? p.weight[col * p.weight_stride + listed[t]] : int8_t(0);
      put(weight + i / size * kChunkStride, t, static_cast<float>(code));
    }
  }

  // Adds a staged chunk's product to fragments C of the warp's part of the tile, which starts at (row, col).
  template <int row_frags, int col_frags>
  __device__ void multiply(float (&c)[row_frags][col_frags][4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    if (x.type == Float::f32) {
      multiply_f32(c, row + lane / 4, col + lane % 4 * 2);
      return;
    }
    const char* b_row = weight + (col + lane % 8 + lane / 16 * 8) * kChunkStride + lane / 8 % 2 * 16;
#pragma unroll
    for (int i = 0; i < row_frags; ++i) {
      uint32_t a[4];
      ldmatrix_x4(a, residual + (row + i * 16 + lane % 16) * kChunkStride + lane / 16 * 16);
#pragma unroll
      for (int j = 0; j < col_frags; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, b_row + j * 8 * kChunkStride);
        if (x.type == Float::bf16) {
          mma_bf16(c[i][j], a, b[0], b[1]);
          mma_bf16(c[i][j + 1], a, b[2], b[3]);
        } else {
          mma_f16(c[i][j], a, b[0], b[1]);
          mma_f16(c[i][j + 1], a, b[2], b[3]);
        }
      }
    }
  }

  template <int row_frags, int col_frags>
  __device__ void multiply_f32(float (&c)[row_frags][col_frags][4], int row, int col) const {
    const auto value = [](const char* rows, int at, int t) {
      return reinterpret_cast<const float*>(rows + at * kChunkStride)[t];
    };
#pragma unroll 1
    for (int t = 0; t < kChunkBytes / 4; ++t) {
#pragma unroll
      for (int i = 0; i < row_frags; ++i) {
        const float above = value(residual, row + i * 16, t), below = value(residual, row + i * 16 + 8, t);
#pragma unroll
        for (int j = 0; j < col_frags; ++j) {
          const float left = value(weight, col + j * 8, t), right = value(weight, col + j * 8 + 1, t);
          c[i][j][0] = __fmaf_rn(above, left, c[i][j][0]);
          c[i][j][1] = __fmaf_rn(above, right, c[i][j][1]);
          c[i][j][2] = __fmaf_rn(below, left, c[i][j][2]);
          c[i][j][3] = __fmaf_rn(below, right, c[i][j][3]);
        }
      }
    }
  }
};

// Tile number `tile` of the output, such that tiles which run at the same time share what they read: bands of 16 tiles
// of rows, and in a band one column of tiles after the other.
struct TilePlace {
  unsigned row, col;
};

__device__ inline TilePlace place_of_tile(unsigned tile, unsigned row_tiles, unsigned col_tiles) {
  const unsigned first = tile / (16 * col_tiles) * 16, inside = tile % (16 * col_tiles);
  const unsigned band = row_tiles - first < 16 ? row_tiles - first : 16;
  return {first + inside % band, inside / band};
}

// How many tiles of `size` cover `count`. Grids have fewer than 2^31 blocks, and a division of 64 bits is a call.
template <int size>
__device__ inline unsigned tiles_of(int64_t count) {
  return static_cast<unsigned>((count + size - 1) / size);
}

}  // namespace int8compile
