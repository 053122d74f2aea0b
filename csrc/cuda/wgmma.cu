// The int8 product by wgmma and TMA, for sm_90a: tiles of 128 rows and 128 or 256 columns.
//
// One warpgroup asks the copy engine for stages of 128 codes of K; two others multiply them, 64 rows each, out of shared
// memory. Two barriers a stage say that it is full (its bytes have arrived) and that it is free (every warp has
// multiplied it). The copy engine puts zeros beyond M, N and K. The epilogue is that of the mma.sync kernel, whose
// fragments have the same layout.

#include "epilogue.cuh"
#include "launch.cuh"

#include "hopper.cuh"

namespace int8compile {
namespace {

constexpr int kRows = 128, kDepth = 128, kThreads = 384;

constexpr int stages_of(int cols) {
  return cols == 256 ? 4 : 5;
}

constexpr int stage_bytes(int cols) {
  return (kRows + cols) * kDepth;
}

// 1024 bytes more, to begin at a multiple of it as the swizzle needs.
constexpr int shared_bytes_of(int cols) {
  return 1024 + stages_of(cols) * (stage_bytes(cols) + 16) + OutlierTile::shared_bytes(kRows, cols) +
         Ends::shared_bytes(cols);
}

struct WgmmaArguments {
  CUtensorMap codes, weight;
  Activation x;
  Quantized q;
  Product p;
  Gathered gathered;
  float residual_from;
};

template <int cols>
__global__ void __launch_bounds__(kThreads, 1) wgmma_gemm(const __grid_constant__ WgmmaArguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int stages = stages_of(cols);
  char* shared = dynamic_shared();
  shared += (1024 - shared_address(shared) % 1024) % 1024;
  auto* full = reinterpret_cast<uint64_t*>(shared + stages * stage_bytes(cols));
  uint64_t* free = full + stages;
  const TilePlace place = place_of_tile(blockIdx.x, tiles_of<kRows>(args.x.rows), tiles_of<cols>(args.p.cols));
  const int64_t row0 = int64_t(place.row) * kRows, col0 = int64_t(place.col) * cols;
  const int steps = static_cast<int>(tiles_of<kDepth>(args.x.k));
  const int thread = threadIdx.x;

  if (thread == 0) {
    for (int stage = 0; stage < stages; ++stage) {
      mbarrier_init(full + stage, 1);
      mbarrier_init(free + stage, 8);  // each multiplying warp arrives
    }
    mbarrier_publish();
  }
  __syncthreads();
  wait_for_previous_kernel();

  if (thread < 128) {
    give_registers<40>();
    if (thread == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % stages;
        char* to = shared + stage * stage_bytes(cols);
        mbarrier_wait(free + stage, (step / stages & 1) ^ 1);
        mbarrier_expect(full + stage, stage_bytes(cols));
        copy_box(to, &args.codes, step * kDepth, static_cast<int>(row0), full + stage);
        copy_box(to + kRows * kDepth, &args.weight, step * kDepth, static_cast<int>(col0), full + stage);
      }
    }
    return;
  }

  take_registers<232>();
  const Group consumers{thread - 128, 256, 1};
  char* const epilogue = shared + stages * (stage_bytes(cols) + 16);
  const Ends ends(consumers, args.p, col0, cols, epilogue + OutlierTile::shared_bytes(kRows, cols));
  const int warpgroup = thread / 128 - 1;
  int32_t sums[1][cols / 8][4];
#pragma unroll
  for (int j = 0; j < cols / 8; ++j) {
    sums[0][j][0] = sums[0][j][1] = sums[0][j][2] = sums[0][j][3] = 0;
  }
  for (int step = 0; step < steps; ++step) {
    const int stage = step % stages;
    const char* codes = shared + stage * stage_bytes(cols) + warpgroup * 64 * kDepth;
    const uint64_t a = wgmma_operand(codes), b = wgmma_operand(shared + stage * stage_bytes(cols) + kRows * kDepth);
    mbarrier_wait(full + stage, step / stages & 1);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kDepth / 32; ++i) {
      wgmma(sums[0], a + i * (32 >> 4), b + i * (32 >> 4));
    }
    wgmma_commit();
    wgmma_wait<1>();  // this warp's part of the step before is done
    if (step > 0 && thread % 32 == 0) {
      mbarrier_arrive(free + (step - 1) % stages);
    }
  }
  wgmma_wait<0>();
#pragma unroll
  for (int j = 0; j < cols / 8; ++j) {  // nothing reads them from before the wait
    asm volatile("" : "+r"(sums[0][j][0]), "+r"(sums[0][j][1]), "+r"(sums[0][j][2]), "+r"(sums[0][j][3])::"memory");
  }

  const OutlierTile outliers(
      args.x, args.q, args.p, args.gathered, args.residual_from, row0, col0, kRows, cols, epilogue);
  const int count = outliers.begin(consumers);
  consumers.sync();  // scales and biases are there
  finish_tile(
      consumers, outliers, ends, count, false, warpgroup * 64 + thread % 128 / 32 * 16, 0, sums);
#endif
}

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, found at run time so that nothing has to be linked with the driver; null if it has none.
Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
}

// Boxes of box_rows x 128 codes of a matrix [rows, k] whose rows are `stride` apart.
bool describe(CUtensorMap* map, const int8_t* data, int64_t rows, int64_t k, int64_t stride, int box_rows) {
  static const Encode encode = find_encode();
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {kDepth, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  return encode != nullptr &&
         encode(
             map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <int cols>
cudaError_t launch_cols(WgmmaArguments& args, bool overlap, cudaStream_t stream) {
  const Product& p = args.p;
  if (!describe(&args.codes, args.q.codes, args.x.rows, args.x.k, args.x.k, kRows) ||
      !describe(&args.weight, p.weight, p.cols, args.x.k, p.weight_stride, cols)) {
    return cudaErrorNotSupported;
  }
  const int64_t tiles = divide_up(args.x.rows, kRows) * divide_up(p.cols, cols);
  return launch(wgmma_gemm<cols>, tiles, kThreads, shared_bytes_of(cols), overlap, stream, args);
}

}  // namespace

bool wgmma_available() {
#ifdef INT8COMPILE_SM90A
  return true;
#else
  return false;
#endif
}

cudaError_t launch_wgmma(
    int tile_cols, const Activation& x, const Quantized& q, const Product& p, float residual_from,
    const Gathered& gathered, bool overlap, cudaStream_t stream) {
  WgmmaArguments args{{}, {}, x, q, p, gathered, residual_from};
  return tile_cols == 256 ? launch_cols<256>(args, overlap, stream) : launch_cols<128>(args, overlap, stream);
}

}  // namespace int8compile
