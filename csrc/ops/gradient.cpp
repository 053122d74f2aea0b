// input_gradient: a float product whose int8 operand becomes floats a slice at a time.
//
// The codes are exact in 16 bits and the scale goes on the gradient (int8compile/ops/input_gradient.py), so the product
// is a float GEMM, which belongs to the library that torch has for it (cuBLAS, oneDNN). What is ours is the other
// operand: as a whole it would be a float copy of the weight, twice or four times what int8 was to save, written to
// memory and read back. Cut along K it stays small, and no sum is split, so the bits are those of the GEMM. Under a CUDA
// graph all of it is captured.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "checks.h"
#include "registry.h"

namespace int8compile {
namespace {

// Elements of the weight that are floats at a time: as many as keep a GPU busy, or as a CPU's cache holds.
#ifdef INT8COMPILE_CUDA
constexpr int64_t kBlock = 1 << 25;
#else
constexpr int64_t kBlock = 1 << 20;
#endif

at::Tensor input_gradient(
    const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& weight_scale, at::ScalarType dtype) {
  constexpr const char* op = "input_gradient";
  check_no_tangent(op, grad, weight_scale);
  INT8COMPILE_CHECK(
      weight.dim() == 2 && weight.scalar_type() == at::kChar && weight.device() == grad.device(), op, "weight is ",
      weight.scalar_type(), " ", weight.sizes(), " on ", weight.device(), "; expected int8 [N, K] on ", grad.device());
  const int64_t n = weight.size(0), k = weight.size(1);
  INT8COMPILE_CHECK(
      grad.dim() >= 1 && is_float(grad.scalar_type()) && grad.size(-1) == n, op, "grad is ", grad.scalar_type(), " ",
      grad.sizes(), "; expected float32, float16 or bfloat16 [..., ", n, "]");
  check_tensor(op, "weight_scale", weight_scale, grad, at::kFloat, {n});
  INT8COMPILE_CHECK(is_float(dtype), op, "dtype=", dtype, "; expected float32, float16 or bfloat16");

  const c10::DeviceGuard guard(grad.device());
  const int64_t m = rows_of(grad);
  const at::Tensor scaled = grad.reshape({m, n}).to(at::kFloat).mul(weight_scale).to(dtype);
  at::Tensor out = at::empty({m, k}, grad.options().dtype(dtype));
  const int64_t step = std::max<int64_t>(64, kBlock / std::max<int64_t>(n, 1) / 64 * 64);
  for (int64_t begin = 0; begin < k; begin += step) {
    const int64_t end = std::min(begin + step, k);
    at::Tensor columns = out.slice(1, begin, end);
    at::mm_out(columns, scaled, weight.slice(1, begin, end).to(dtype));
  }
  at::DimVector sizes(grad.sizes());
  sizes.back() = k;
  return out.view(sizes);
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_KERNELS(m) {
  m.impl("input_gradient", &int8compile::input_gradient);
}
