// The int8 product by mma.sync (sm_80 and later), with the outlier product and the rest of the epilogue in it.
//
// A block computes one tile of the output, or, of a tile that several blocks share along K, its part of the sums. K goes
// by in stages that cp.async keeps full ahead of use. In shared memory a stage is rows of `depth` codes, the activation's
// and then the weight's, whose 16-byte chunks are permuted within a row so that the eight rows an ldmatrix reads lie in
// different banks. Chunks beyond K, M or N are zeros, which add nothing.
//
// Blocks that share a tile leave their sums in memory and draw a ticket; the last one adds them up, which in int32 is
// exact in any order, and finishes the tile.

#pragma once

#include "epilogue.cuh"

namespace int8compile {

struct GemmArguments {
  Activation x;
  Quantized q;
  Product p;
  Gathered gathered;
  SplitK split;
  float residual_from;
};

template <int tile_rows, int tile_cols, int depth, int row_warps, int col_warps, int stages, bool is_aligned>
struct Gemm {
  static constexpr int warps = row_warps * col_warps, threads = warps * 32;
  static constexpr int row_frags = tile_rows / row_warps / 16, col_frags = tile_cols / col_warps / 8;
  static constexpr int chunks = depth / 16;  // of a row of a stage
  static constexpr int stage_bytes = (tile_rows + tile_cols) * depth;
  static constexpr int ends_at = stages * stage_bytes + OutlierTile::shared_bytes(tile_rows, tile_cols);
  static constexpr int shared_bytes = ends_at + Ends::shared_bytes(tile_cols) + 16;
  static_assert(col_frags % 2 == 0 && (depth == 64 || depth == 128), "two columns of fragments come from an ldmatrix");

  // Where chunk `chunk` of a stage's row lies.
  __device__ static int place(int row, int chunk) {
    return row * depth + ((chunk ^ (depth == 64 ? row / 2 % 4 : row % 8)) * 16);
  }

  // Begins to fill `to` with rows [row0, row0 + count) of a matrix [rows, k], codes k0 .. k0 + depth. A thread copies one
  // chunk of every `step`th row.
  template <int count>
  __device__ static void load(
      char* to, const int8_t* from, int64_t stride, int64_t row0, int64_t rows, int64_t k0, int64_t k) {
    constexpr int step = threads / chunks;
    const int chunk = static_cast<int>(threadIdx.x) % chunks, first = static_cast<int>(threadIdx.x) / chunks;
    const int64_t at = k0 + chunk * 16;
    const int rows_there = at >= k ? 0 : rows - row0 < count ? static_cast<int>(rows - row0) : count;
    const int8_t* source = from + (row0 + first) * stride + at;
#pragma unroll
    for (int row = first; row < count; row += step, source += step * stride) {
      const bool there = row < rows_there;
      char* target = to + place(row, chunk);
      if constexpr (is_aligned) {
        cp_async_16(target, there ? source : from, there);
      } else {
        *reinterpret_cast<uint4*>(target) = load_bytes(source, !there ? 0 : k - at < 16 ? static_cast<int>(k - at) : 16);
      }
    }
  }

  __device__ static uint4 load_bytes(const int8_t* from, int count) {
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      words[i / 4] |= i < count ? static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << (8 * (i % 4)) : 0u;
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }

  // sums += the product of a stage.
  __device__ static void multiply(const char* stage, int row, int col, int32_t (&sums)[row_frags][col_frags][4]) {
    const int lane = threadIdx.x % 32;
    const char* weight = stage + tile_rows * depth;
#pragma unroll
    for (int step = 0; step < depth / 32; ++step) {
      uint32_t a[row_frags][4];
#pragma unroll
      for (int i = 0; i < row_frags; ++i) {
        ldmatrix_x4(a[i], stage + place(row + i * 16 + lane % 16, step * 2 + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < col_frags; j += 2) {
        uint32_t b[4];
        ldmatrix_x4(b, weight + place(col + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int i = 0; i < row_frags; ++i) {
          mma_s8(sums[i][j], a[i], b[0], b[1]);
          mma_s8(sums[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }

  // Adds up the sums of the blocks that share a tile; false for all but the last of them, which has the total.
  __device__ static bool combine(
      const SplitK& split, unsigned tile, int part, int* ticket, int32_t (&sums)[row_frags][col_frags][4]) {
    constexpr int frags = row_frags * col_frags;
    int4* parts = reinterpret_cast<int4*>(split.partial) + int64_t(tile) * split.splits * frags * threads;
    int4* mine = parts + int64_t(part) * frags * threads;
#pragma unroll
    for (int f = 0; f < frags; ++f) {
      const int32_t(&from)[4] = sums[f / col_frags][f % col_frags];
      mine[f * threads + threadIdx.x] = make_int4(from[0], from[1], from[2], from[3]);
    }
    __threadfence();  // the sums are there for whoever sees the ticket drawn
    __syncthreads();
    if (threadIdx.x == 0) {
      *ticket = static_cast<int>(atomicAdd(split.tickets + tile, 1u));
    }
    __syncthreads();
    if (*ticket != split.splits - 1) {
      return false;
    }
    __threadfence();
    for (int other = 0; other < split.splits; ++other) {
      if (other == part) {
        continue;
      }
      const int4* theirs = parts + int64_t(other) * frags * threads;
#pragma unroll
      for (int f = 0; f < frags; ++f) {
        const int4 from = __ldcg(theirs + f * threads + threadIdx.x);  // from L2: L1 is not coherent
        int32_t(&to)[4] = sums[f / col_frags][f % col_frags];
        to[0] += from.x;
        to[1] += from.y;
        to[2] += from.z;
        to[3] += from.w;
      }
    }
    return true;
  }

  __device__ static void run(const GemmArguments& args) {
    char* shared = dynamic_shared();
    int* ticket = reinterpret_cast<int*>(shared + shared_bytes - 16);
    const int64_t m = args.x.rows, n = args.p.cols, k = args.x.k;
    const unsigned splits = args.split.splits, part = blockIdx.x % splits, tile = blockIdx.x / splits;
    const TilePlace at = place_of_tile(tile, tiles_of<tile_rows>(m), tiles_of<tile_cols>(n));
    const int64_t row0 = int64_t(at.row) * tile_rows, col0 = int64_t(at.col) * tile_cols;
    const unsigned steps_in_all = tiles_of<depth>(k), first = steps_in_all * part / splits;
    const int steps = static_cast<int>(steps_in_all * (part + 1) / splits - first);
    const Group block{static_cast<int>(threadIdx.x), threads, 0};
    const OutlierTile outliers(
        args.x, args.q, args.p, args.gathered, args.residual_from, row0, col0, tile_rows, tile_cols,
        shared + stages * stage_bytes);

    const auto load_codes = [&](int step) {
      load<tile_rows>(shared + step % stages * stage_bytes, args.q.codes, k, row0, m, int64_t(first + step) * depth, k);
    };
    const auto load_weight = [&](int step) {
      load<tile_cols>(
          shared + step % stages * stage_bytes + tile_rows * depth, args.p.weight, args.p.weight_stride, col0, n,
          int64_t(first + step) * depth, k);
    };

    for (int step = 0; step < stages - 1 && step < steps; ++step) {
      load_weight(step);
    }
    const Ends ends(block, args.p, col0, tile_cols, shared + ends_at);
    wait_for_previous_kernel();  // whatever comes from the activation is there from here on
    for (int step = 0; step < stages - 1; ++step) {
      if (step < steps) {
        load_codes(step);
      }
      cp_async_commit();
    }
    // A few rows gather for themselves, while the first stages are under way.
    const bool prepare = args.gathered.capacity == 0;
    int count = prepare ? outliers.begin(block) : 0;
    if (count > 0) {
      outliers.stage(block, 0, count);
    }

    const int warp = threadIdx.x / 32;
    const int row = warp / col_warps * row_frags * 16, col = warp % col_warps * col_frags * 8;
    int32_t sums[row_frags][col_frags][4] = {};
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<stages - 2>();
      __syncthreads();  // this stage is full, and everyone is done with the one before, which is filled next
      if (step + stages - 1 < steps) {
        load_weight(step + stages - 1);
        load_codes(step + stages - 1);
      }
      cp_async_commit();
      multiply(shared + step % stages * stage_bytes, row, col, sums);
    }
    if (steps == 0) {
      block.sync();  // no stage has brought one
    }
    if (splits > 1 && !combine(args.split, tile, static_cast<int>(part), ticket, sums)) {
      return;
    }
    if (!prepare) {
      count = outliers.begin(block);
    }
    finish_tile(block, outliers, ends, count, prepare, row, col, sums);
  }
};

template <class Config>
__global__ void __launch_bounds__(Config::threads, 1) gemm(const __grid_constant__ GemmArguments args) {
  Config::run(args);
}

}  // namespace int8compile
