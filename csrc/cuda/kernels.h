// What the CUDA kernels have in common with their callers: plain pointers, sizes and streams, no torch header.
//
// Operands are as in ops/*.py: codes [M, K] and weight [N, K], both int8 with K contiguous; row_scale [M] and
// weight_scale [N], fp32; `flags` [K], a byte a column, not 0 where the column is an outlier column. One file a kernel,
// with its launcher; plan.cpp has the table that chooses between them. Launchers queue work on a stream and return:
// nothing is read back, and a launcher's choices depend on sizes and on the GPU alone, so that a captured CUDA graph is
// right whatever outliers its replays meet.

#pragma once

#include <cstdint>

#ifdef INT8COMPILE_EMULATED
#include "emulation.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace int8compile {

enum class Float : uint8_t { f32, bf16, f16 };

inline int64_t size_of(Float type) {
  return type == Float::f32 ? 4 : 2;
}

// A contiguous activation [rows, k].
struct Activation {
  const void* data;
  Float type;
  int64_t rows, k;
};

// How an activation is quantised. Threshold 0: no element is an outlier.
struct Thresholds {
  float outlier;
  float residual_from;  // of outlier columns, the smallest magnitude that carries a residual; 0: all
};

// Codes of an activation and the outlier columns that were met; flags is null where none are looked for.
struct Quantized {
  int8_t* codes;  // [rows, k]
  float* row_scale;
  uint8_t* flags;
};

// What the codes are multiplied with, and where the result goes.
struct Product {
  int64_t cols;
  const int8_t* weight;
  int64_t weight_stride;
  const float* weight_scale;
  const void* bias;  // or null
  Float bias_type;
  void* out;  // [rows, cols]
  Float out_type;
};

// The first columns of the outlier product, gathered: what codes leave over of x, and the weights. Every product kernel
// can gather for itself; this saves them from doing it again for each tile. capacity 0: nothing is gathered.
constexpr int kGatherCapacity = 128;

struct Gathered {
  int capacity;
  int* count;      // outlier columns in all, which may be more than capacity
  void* residual;  // [rows, capacity] of x's type; zero behind the last column, up to a multiple of 16
  int8_t* weight;  // [cols, capacity]; the same
};

// A product's scratch memory when several blocks share a tile along K.
struct SplitK {
  int splits;
  int32_t* partial;  // [tiles, splits, elements of a tile]
  unsigned* tickets;  // [tiles], zero before the kernel starts
};

// `overlap`: the kernel before on the stream belongs to the same operator call, so this one may start before it ends.
// (Programmatic dependent launch; every kernel waits for the one before it ahead of reading what that one wrote.)

cudaError_t launch_zero(void* data, int64_t bytes, cudaStream_t stream);

cudaError_t launch_quantize(
    const Activation& x, float threshold, const Quantized& out, bool overlap, cudaStream_t stream);

cudaError_t launch_gather(
    const Activation& x, const Quantized& q, const Product& p, float residual_from, const Gathered& out, bool overlap,
    cudaStream_t stream);

// Up to 8 rows, which share each weight as it streams by. Needs aligned operands (see `aligned`). `fused` quantises x
// in every block first; `q` is then left alone and `q.flags` says only whether outliers are looked for.
constexpr int64_t kSkinnyRows = 8;
constexpr int64_t kFusedElements = 16384;

cudaError_t launch_skinny(
    const Activation& x, const Quantized& q, const Product& p, Thresholds thresholds, bool fused, bool overlap,
    cudaStream_t stream);

// Tensor-core tiles by mma.sync, for sm_80 and later. `unaligned` takes any operands, slowly.
enum class Tile : uint8_t { t128x128, t64x64, t32x64, t16x64, unaligned };

struct TileShape {
  int rows, cols, depth;  // depth: codes of K a stage holds
};

constexpr TileShape shape_of(Tile tile) {
  return tile == Tile::t128x128 ? TileShape{128, 128, 64}
       : tile == Tile::t32x64   ? TileShape{32, 64, 128}
       : tile == Tile::t16x64   ? TileShape{16, 64, 128}
                                : TileShape{64, 64, 128};
}

cudaError_t launch_gemm(
    Tile tile, const Activation& x, const Quantized& q, const Product& p, float residual_from,
    const Gathered& gathered, const SplitK& split, bool overlap, cudaStream_t stream);

// Tiles of 128 x 128 or 128 x 256 by wgmma and TMA, for sm_90a. False from wgmma_available(): not built for this GPU.
bool wgmma_available();

cudaError_t launch_wgmma(
    int tile_cols, const Activation& x, const Quantized& q, const Product& p, float residual_from,
    const Gathered& gathered, bool overlap, cudaStream_t stream);

// Whether rows start on 16 bytes and are multiples of them, which the fast kernels ask for.
inline bool aligned(const void* data, int64_t stride, int64_t k) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 16 == 0 && k % 16 == 0 && k > 0;
}

// The GPU that is current. From a table: after a GPU's first call these ask the driver nothing.
struct Gpu {
  int index, multiprocessors, capability;  // capability: 80, 89, 90, ...
};

Gpu current_gpu();

}  // namespace int8compile
