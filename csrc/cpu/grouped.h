// Linears of several experts, each on rows of its own, above the kernels.

#pragma once

#include <cstdint>
#include <vector>

#include "product.h"

namespace int8compile {

// The rows [begin, end) of one expert; there is at least one.
struct Group {
  int64_t expert, begin, end;
};

// Where the offsets' groups are, in order and without a gap. Whatever the offsets hold, groups lie in [0, rows).
std::vector<Group> groups_of(const int32_t* offsets, int64_t experts, int64_t rows);

// The experts' weights, and where the results go.
struct Experts {
  int64_t cols;
  const int8_t* weight;  // [experts, cols, k], each row contiguous
  int64_t expert_stride, row_stride;
  const float* weight_scale;  // [experts, cols]
  const void* bias;  // [experts, cols], or null
  Float bias_type;
  void* out;  // [rows, cols]
};

// Rows behind the last group are left as they are.
void quantized_groups(
    const Activation& x, const std::vector<Group>& groups, bool outliers, float threshold, float residual_from,
    const Experts& experts);

// The same with the weights alone in int8.
void weight_only_groups(const Activation& x, const std::vector<Group>& groups, const Experts& experts);

}  // namespace int8compile
