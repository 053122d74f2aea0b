// One operator call above the kernels: a plan, scratch memory, and the launches.

#pragma once

#include "plan.h"

namespace int8compile {

struct Problem {
  Activation x;
  Product p;
  Thresholds thresholds;
  Choice choice;
};

// Scratch memory is one piece, aligned to 256 bytes, of the size that the first function of each pair gives. It may be
// freed in stream order as soon as the second has returned.

// quantize_rowwise and the product, for `linear`.
int64_t linear_scratch(const Problem& problem, const Gpu& gpu);
cudaError_t run_linear(const Problem& problem, const Gpu& gpu, void* scratch, cudaStream_t stream);

// The product alone, for `scaled_mm`; q.flags is null where there is no outlier product.
int64_t product_scratch(const Problem& problem, const Quantized& q, const Gpu& gpu);
cudaError_t run_product(
    const Problem& problem, const Quantized& q, const Gpu& gpu, void* scratch, cudaStream_t stream);

// Codes, scales and flags; q.flags may be null.
cudaError_t run_quantize(const Activation& x, float threshold, const Quantized& q, cudaStream_t stream);

}  // namespace int8compile
