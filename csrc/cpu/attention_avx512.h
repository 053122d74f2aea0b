// How attention multiplies floats with AVX512 F and BW. See attention_block.h.
//
// Of 32 registers 24 are accumulators, 6 rows by 4 vectors of 16 floats.

#pragma once

#include <cstdint>

#include "attention_product.h"
#include "transpose.h"
#include "vec_avx512.h"

namespace int8compile {
namespace {

struct Avx512Form : Widened<Avx512Vec> {
  static constexpr int rows = 6, vecs = 4;

  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    int8compile::transpose(from, from_stride, to, to_stride);
  }
};

}  // namespace
}  // namespace int8compile
