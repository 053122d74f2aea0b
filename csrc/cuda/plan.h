// Which kernel computes a product: the dispatch table. Sizes and the GPU decide, never values, so a captured graph stays
// right. Plain C++, so that the table can be read, and tested, anywhere.

#pragma once

#include <string>

#include "kernels.h"

namespace int8compile {

enum class Kernel : uint8_t { fused, skinny, tile, wgmma128, wgmma256 };

struct Plan {
  Kernel kernel;
  Tile tile;  // of Kernel::tile
  int splits;  // along K
  bool gather;  // a kernel of its own gathers the outlier product's operands
};

struct Sizes {
  int64_t m, n, k;
  bool aligned;  // both operands, for 16-byte loads
  bool can_fuse;  // x is at hand unquantised, and aligned too
};

// What has been proven to work on this GPU, or is asked for.
struct Choice {
  bool wgmma;  // wgmma kernels may be chosen
  const char* forced;  // the name of a kernel, for tests; null: the table decides
};

// Throws std::invalid_argument for a forced kernel that cannot compute these sizes.
Plan plan(const Sizes& sizes, const Gpu& gpu, const Choice& choice);

// "fused", "skinny", "t64x64", "t64x64 / 4" (splits), "wgmma256", ...
std::string name_of(const Plan& plan);

bool is_kernel_name(const std::string& name);

}  // namespace int8compile
