// The tiles of gemm.cuh that are built.

#include "gemm.cuh"
#include "launch.cuh"

namespace int8compile {
namespace {

template <int row_warps, int col_warps, int stages, bool is_aligned, Tile tile>
cudaError_t launch_tile(const GemmArguments& args, bool overlap, cudaStream_t stream) {
  constexpr TileShape shape = shape_of(tile);
  using Config = Gemm<shape.rows, shape.cols, shape.depth, row_warps, col_warps, stages, is_aligned>;
  const int64_t tiles = divide_up(args.x.rows, shape.rows) * divide_up(args.p.cols, shape.cols);
  return launch(
      gemm<Config>, tiles * args.split.splits, Config::threads, Config::shared_bytes, overlap, stream, args);
}

}  // namespace

cudaError_t launch_gemm(
    Tile tile, const Activation& x, const Quantized& q, const Product& p, float residual_from,
    const Gathered& gathered, const SplitK& split, bool overlap, cudaStream_t stream) {
  const GemmArguments args{x, q, p, gathered, split, residual_from};
  switch (tile) {
    case Tile::t128x128:
      return launch_tile<2, 4, 4, true, Tile::t128x128>(args, overlap, stream);
    case Tile::t64x64:
      return launch_tile<2, 2, 4, true, Tile::t64x64>(args, overlap, stream);
    case Tile::t32x64:
      return launch_tile<1, 4, 5, true, Tile::t32x64>(args, overlap, stream);
    case Tile::t16x64:
      return launch_tile<1, 4, 6, true, Tile::t16x64>(args, overlap, stream);
    default:
      return launch_tile<2, 2, 2, false, Tile::unaligned>(args, overlap, stream);
  }
}

}  // namespace int8compile
