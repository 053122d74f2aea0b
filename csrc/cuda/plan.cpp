// The dispatch table. The sizes at which one kernel takes over from another are estimates from a roofline and have not
// been measured yet; benchmarks/gpu times each.
//
//   M            kernel      why
//   1..8         skinny      the weight's stream is all that counts; one kernel with quantisation in it ("fused") while
//                            x has few enough elements that every block can quantise all of it
//   9..64        tiles of 16, 32 or 64 rows x 64, K shared between blocks until they fill the GPU twice over
//   65..         the first of 128x256, 128x128 (both wgmma on sm_90a; mma.sync has 128x128) that fills three quarters
//                of the GPU, else 64x64
//   unaligned    64x64 with byte loads: right for every stride and tail, slow

#include "plan.h"

#include <algorithm>
#include <stdexcept>

namespace int8compile {
namespace {

constexpr int64_t kFewRows = 64;  // up to here the product gathers outlier columns itself: each weight is in one tile
constexpr int64_t kStepsWorthABlock = 4;  // stages along K

struct Name {
  const char* name;
  Kernel kernel;
  Tile tile;
};

constexpr Name kNames[] = {
    {"fused", Kernel::fused, Tile::unaligned},
    {"skinny", Kernel::skinny, Tile::unaligned},
    {"t16x64", Kernel::tile, Tile::t16x64},
    {"t32x64", Kernel::tile, Tile::t32x64},
    {"t64x64", Kernel::tile, Tile::t64x64},
    {"t128x128", Kernel::tile, Tile::t128x128},
    {"unaligned", Kernel::tile, Tile::unaligned},
    {"wgmma128", Kernel::wgmma128, Tile::t128x128},
    {"wgmma256", Kernel::wgmma256, Tile::t128x128},
};

const Name* find(const std::string& name) {
  const Name* found = std::find_if(std::begin(kNames), std::end(kNames), [&](const Name& n) { return name == n.name; });
  return found == std::end(kNames) ? nullptr : found;
}

int64_t tiles_of(const Sizes& s, int64_t rows, int64_t cols) {
  return (s.m + rows - 1) / rows * ((s.n + cols - 1) / cols);
}

bool fills(const Sizes& s, int64_t cols, const Gpu& gpu) {
  return tiles_of(s, 128, cols) * 4 >= int64_t(gpu.multiprocessors) * 3;
}

bool can_compute(const Plan& plan, const Sizes& s, const Gpu& gpu) {
  switch (plan.kernel) {
    case Kernel::fused:
      return s.aligned && s.can_fuse && s.m <= kSkinnyRows && s.m * s.k <= kFusedElements;
    case Kernel::skinny:
      return s.aligned && s.m <= kSkinnyRows;
    case Kernel::tile:
      return s.aligned || plan.tile == Tile::unaligned;
    default:
      return s.aligned && gpu.capability == 90 && wgmma_available();
  }
}

Plan choose(const Sizes& s, const Gpu& gpu, const Choice& choice) {
  const auto tile = [](Tile t) { return Plan{Kernel::tile, t, 1, false}; };
  if (!s.aligned) {
    return tile(Tile::unaligned);
  }
  if (s.m <= kSkinnyRows) {
    const Plan fused{Kernel::fused, Tile::unaligned, 1, false};
    return can_compute(fused, s, gpu) ? fused : Plan{Kernel::skinny, Tile::unaligned, 1, false};
  }
  if (s.m <= kFewRows) {
    return tile(s.m <= 16 ? Tile::t16x64 : s.m <= 32 ? Tile::t32x64 : Tile::t64x64);
  }
  const bool wgmma = choice.wgmma && gpu.capability == 90;
  if (wgmma && fills(s, 256, gpu)) {
    return {Kernel::wgmma256, Tile::t128x128, 1, false};
  }
  if (fills(s, 128, gpu)) {
    return wgmma ? Plan{Kernel::wgmma128, Tile::t128x128, 1, false} : tile(Tile::t128x128);
  }
  return tile(Tile::t64x64);
}

int splits_of(const Sizes& s, Tile tile, const Gpu& gpu) {
  const TileShape shape = shape_of(tile);
  const int64_t tiles = std::max<int64_t>(tiles_of(s, shape.rows, shape.cols), 1);
  const int64_t wanted = (2 * int64_t(gpu.multiprocessors) + tiles - 1) / tiles;
  const int64_t most = (s.k + shape.depth - 1) / shape.depth / kStepsWorthABlock;
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, most), 1, 16));
}

}  // namespace

Plan plan(const Sizes& sizes, const Gpu& gpu, const Choice& choice) {
  Plan result = choose(sizes, gpu, choice);
  if (choice.forced != nullptr) {
    const Name* name = find(choice.forced);
    if (name == nullptr) {
      throw std::invalid_argument(std::string("no CUDA kernel is named '") + choice.forced + "'");
    }
    result = {name->kernel, name->tile, 1, false};
    if (!can_compute(result, sizes, gpu)) {
      throw std::invalid_argument(
          std::string("kernel '") + choice.forced + "' was asked for, which cannot multiply [" +
          std::to_string(sizes.m) + ", " + std::to_string(sizes.k) + "] by [" + std::to_string(sizes.n) + ", " +
          std::to_string(sizes.k) + "]" + (sizes.aligned ? "" : " unaligned") + " on sm_" +
          std::to_string(gpu.capability));
    }
  }
  if (result.kernel == Kernel::tile && result.tile != Tile::t128x128 && sizes.m <= kFewRows) {
    result.splits = splits_of(sizes, result.tile, gpu);
  }
  result.gather = sizes.m > kFewRows;
  return result;
}

std::string name_of(const Plan& plan) {
  for (const Name& name : kNames) {
    if (name.kernel == plan.kernel && (plan.kernel != Kernel::tile || name.tile == plan.tile)) {
      return name.name + (plan.splits > 1 ? " / " + std::to_string(plan.splits) : std::string());
    }
  }
  return "?";
}

bool is_kernel_name(const std::string& name) {
  return find(name) != nullptr;
}

}  // namespace int8compile
