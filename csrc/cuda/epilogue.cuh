// What becomes of a tile's exact sums: row scale, outlier product, column scale, bias, one rounding, the output.
//
// Column scales and biases lie in shared memory before the sums are complete: a load from global memory behind every
// store would wait for it, dozens of times a tile.

#pragma once

#include "outliers.cuh"

namespace int8compile {

// The columns of a tile, [cols] scale and bias in shared memory.
struct Ends {
  float2* of;
  bool has_bias;

  static constexpr int shared_bytes(int cols) {
    return cols * 8;
  }

  // Called by all threads of the group; a barrier has to come before the first use.
  __device__ __forceinline__ Ends(const Group& group, const Product& p, int64_t col0, int cols, char* shared)
      : of(reinterpret_cast<float2*>(shared)), has_bias(p.bias != nullptr) {
    for (int i = group.thread; i < cols; i += group.threads) {
      const bool there = col0 + i < p.cols;
      of[i] = make_float2(
          there ? p.weight_scale[col0 + i] : 0.0f, there && has_bias ? load_float(p.bias, p.bias_type, col0 + i) : 0.0f);
    }
  }

  __device__ float finish(float value, float scale, float bias) const {
    value = __fmul_rn(value, scale);
    return has_bias ? __fadd_rn(value, bias) : value;
  }
};

// Lane t of four has words w[0..4); afterwards it has word t of each of the four lanes.
__device__ inline void transpose_quad(uint32_t (&w)[4]) {
#pragma unroll
  for (int distance = 1; distance < 4; distance *= 2) {
    const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & distance) == 0) {
        const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? w[i] : w[i + distance], distance);
        w[i] = upper ? got : w[i];
        w[i + distance] = upper ? w[i + distance] : got;
      }
    }
  }
}

// The output of a warp's part of a tile, which starts at (row, col) of the tile at (row0, col0).
template <int row_frags, int col_frags>
struct Stored {
  const Product& p;
  int64_t rows;  // of the output
  int64_t first_row, first_col;  // of the lane
  int lane;

  __device__ bool in_wide_pieces() const {
    return col_frags % 4 == 0 && p.out_type != Float::f32 && p.cols % 8 == 0;
  }

  // 16 bytes a lane and 64 in a row: four fragments of the lane's pair of columns become one of eight columns.
  template <Float type>
  __device__ void put_wide(const float (&c)[row_frags][col_frags][4]) const {
    auto* out = static_cast<uint16_t*>(p.out);
#pragma unroll
    for (int i = 0; i < row_frags; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + i * 16 + half * 8;
#pragma unroll
        for (int j = 0; j + 3 < col_frags; j += 4) {
          uint32_t words[4];
#pragma unroll
          for (int f = 0; f < 4; ++f) {
            words[f] = two_to_16_bits(c[i][j + f][2 * half], c[i][j + f][2 * half + 1], type);
          }
          transpose_quad(words);
          const int64_t at = first_col - lane % 4 * 2 + (j + lane % 4) * 8;
          if (row < rows && at < p.cols) {
            *reinterpret_cast<uint4*>(out + row * p.cols + at) = make_uint4(words[0], words[1], words[2], words[3]);
          }
        }
      }
    }
  }

  __device__ void put_pairs(const float (&c)[row_frags][col_frags][4]) const {
    const bool in_pairs = p.cols % 2 == 0;
#pragma unroll
    for (int j = 0; j < col_frags; ++j) {
      const int64_t at = first_col + j * 8;
#pragma unroll
      for (int i = 0; i < row_frags; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t row = first_row + i * 16 + half * 8;
          if (row >= rows || at >= p.cols) {
            continue;
          }
          const float one = c[i][j][2 * half], other = c[i][j][2 * half + 1];
          if (in_pairs) {
            store_two_floats(p.out, p.out_type, row * p.cols + at, one, other);
          } else {
            store_float(p.out, p.out_type, row * p.cols + at, one);
            if (at + 1 < p.cols) {
              store_float(p.out, p.out_type, row * p.cols + at + 1, other);
            }
          }
        }
      }
    }
  }
};

// From exact sums to output: row scale, the outlier product of `count` columns, column scale, bias, one rounding.
// Called by all threads of the group; `sums` are the fragments of the warp's part of the tile, at (row, col) of it.
// `staged`: the first chunk lies in shared memory already.
template <int row_frags, int col_frags>
__device__ inline void finish_tile(
    const Group& group, const OutlierTile& tile, const Ends& ends, int count, bool staged, int row, int col,
    int32_t (&sums)[row_frags][col_frags][4]) {
  const int lane = threadIdx.x % 32;
  const int64_t first_row = tile.row0 + row + lane / 4, first_col = tile.col0 + col + lane % 4 * 2;
  float c[row_frags][col_frags][4];
#pragma unroll
  for (int i = 0; i < row_frags; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first_row + i * 16 + half * 8;
      const float scale = at < tile.x.rows ? tile.q.row_scale[at] : 0.0f;
#pragma unroll
      for (int j = 0; j < col_frags; ++j) {
        c[i][j][2 * half] = __fmul_rn(__int2float_rn(sums[i][j][2 * half]), scale);
        c[i][j][2 * half + 1] = __fmul_rn(__int2float_rn(sums[i][j][2 * half + 1]), scale);
      }
    }
  }
  for (int t0 = 0; t0 < count; t0 += tile.chunk()) {
    if (t0 > 0) {
      group.sync();  // everyone is done with the chunk before
    }
    if (t0 > 0 || !staged) {
      tile.stage(group, t0, count);
    }
    tile.multiply(c, row, col);
  }
#pragma unroll
  for (int j = 0; j < col_frags; ++j) {
    const float4 two = *reinterpret_cast<const float4*>(ends.of + col + lane % 4 * 2 + j * 8);
#pragma unroll
    for (int i = 0; i < row_frags; ++i) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        c[i][j][at] = at % 2 == 0 ? ends.finish(c[i][j][at], two.x, two.y) : ends.finish(c[i][j][at], two.z, two.w);
      }
    }
  }
  const Stored<row_frags, col_frags> out{tile.p, tile.x.rows, first_row, first_col, lane};
  if (!out.in_wide_pieces()) {
    out.put_pairs(c);
  } else if (tile.p.out_type == Float::bf16) {
    out.template put_wide<Float::bf16>(c);
  } else {
    out.template put_wide<Float::f16>(c);
  }
}

}  // namespace int8compile
