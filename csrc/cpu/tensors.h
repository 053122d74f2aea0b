// Tensors as the kernels take them.

#pragma once

#include <ATen/core/Tensor.h>

#include "../ops/checks.h"
#include "product.h"

namespace int8compile {

inline Float float_type(at::ScalarType type) {
  return type == at::kFloat ? Float::f32 : type == at::kHalf ? Float::f16 : Float::bf16;
}

// Of a contiguous tensor [..., K].
inline Activation activation(const at::Tensor& x) {
  return {x.const_data_ptr(), float_type(x.scalar_type()), rows_of(x), x.size(-1)};
}

}  // namespace int8compile
