// The provider for every CPU: plain C++ in loops that a compiler can vectorise for its baseline.
//
// The int16 products become pmaddwd on x86-64 and smlal on aarch64.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "finish.h"
#include "float_product.h"
#include "kernels.h"
#include "plan.h"
#include "quantize.h"
#include "vec_portable.h"
#include "widened.h"

namespace int8compile {
namespace {

struct PortableMicro {
  static constexpr int64_t max_rows = 2;

  template <int rows, class Code>
  static void run(
      const int16_t* panel, const Code* weight, int64_t stride, int64_t cols, int64_t chunks, int64_t last, bool add,
      int32_t* sums) {
    for (int64_t n = 0; n < cols; ++n) {
      const Code* w = weight + n * stride;
      for (int r = 0; r < rows; ++r) {
        const int16_t* a = panel + r * kChunk;
        int32_t sum = add ? sums[r * kTileCols + n] : 0;
        for (int64_t c = 0; c < chunks; ++c) {
          for (int64_t i = 0; i < kChunk; ++i) {
            sum += int32_t(a[c * rows * kChunk + i]) * int32_t(int16_t(w[c * kChunk + i]));
          }
        }
        if (last != kNone) {
          for (int64_t i = 0; i < kChunk; ++i) {
            sum += int32_t(a[chunks * rows * kChunk + i]) * int32_t(int16_t(w[last + i]));
          }
        }
        sums[r * kTileCols + n] = sum;
      }
    }
  }
};

constexpr Kernels kPortable = {
    "portable",
    quantize_row_of<PortableVec>,
    residual_row_of<PortableVec>,
    quantize_calibrated_row_of<PortableVec>,
    Multipliers().with(Method::widened, {widened_product<PortableMicro>}),
    portable_method,
    finish_tile<PortableVec>,
    widen_row<PortableVec>,
    float_product<PortableVec>,
};

}  // namespace

const Kernels* portable_kernels() {
  return &kPortable;
}

}  // namespace int8compile
