// Checks that the operators' C++ kernels share. Each names the operator, the argument, its value and what was expected.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#define INT8COMPILE_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, "int8compile::", op, ": ", __VA_ARGS__)

namespace int8compile {

inline bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

// A tensor argument on `like`'s device, of this dtype and shape; `source` says where one comes from.
inline void check_tensor(
    const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& like, at::ScalarType dtype,
    at::IntArrayRef sizes, const char* source = "") {
  INT8COMPILE_CHECK(
      tensor.device() == like.device() && tensor.scalar_type() == dtype && tensor.sizes() == sizes, op, name, " is ",
      tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(), "; expected ", dtype, " ", sizes, " on ",
      like.device(), source);
}

// The M of a [..., K] tensor; by multiplication, since K may be 0.
inline int64_t rows_of(const at::Tensor& x) {
  int64_t rows = 1;
  for (const int64_t size : x.sizes().slice(0, x.dim() - 1)) {
    rows *= size;
  }
  return rows;
}

}  // namespace int8compile
