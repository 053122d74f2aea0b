// One operator call above the kernels: rows quantised, outlier columns listed, the product over tiles and threads.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace int8compile {

// A contiguous activation [rows, k].
struct Activation {
  const void* data;
  Float type;
  int64_t rows, k;
};

// What the codes of an activation are multiplied with, and where the result goes.
struct Product {
  int64_t cols;
  Codes weight;
  const float* weight_scale;
  const void* bias;  // or null
  Float bias_type;
  void* out;  // [rows, cols]
  Float out_type;
  int64_t out_stride = 0;  // between rows of out; 0: cols
};

// codes [rows, k], scale [rows] and, unless null, outliers [k] as 0 and 1.
void quantize_rows(const Activation& x, float threshold, int8_t* codes, float* scale, uint8_t* outliers);

// The product of quantised rows. `outliers` [k] is null or what quantize_rows gives; of outlier columns, elements of
// magnitude `residual_from` and up carry a residual.
void scaled_product(
    const Activation& x, const int8_t* codes, const float* row_scale, const uint8_t* outliers, float residual_from,
    const Product& product);

// The columns of policy "calibrated", in ascending order, and a copy of the weight in them, [cols, count], or null.
struct Columns {
  int64_t count;
  const int32_t* at;
  Codes weight;
};

// The product under policy "calibrated": codes have 16 bits in the columns (quantize_calibrated_row of kernels.h).
void calibrated_linear(const Activation& x, const Columns& columns, const Product& product);

// Both, with the codes in between in scratch memory.
void quantized_linear(const Activation& x, bool outliers, float threshold, float residual_from, const Product& product);

}  // namespace int8compile
