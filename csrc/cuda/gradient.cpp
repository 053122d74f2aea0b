// input_gradient for CUDA tensors: cuBLAS's float product, whose int8 operand becomes floats a slice at a time.
//
// The codes are exact in 16 bits, the scale goes on the gradient (ops/input_gradient.py), so the product is one that
// cuBLAS does at its full speed. As a whole its second operand would be a 16-bit copy of the weight, twice what int8 was
// to save; cut along K no sum is split and the copy stays small. Under a CUDA graph all of it is captured.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>

#include "checks.h"
#include "device.h"

namespace int8compile {
namespace {

constexpr int64_t kBlock = 1 << 25;  // elements of the weight that are floats at a time: 64 MiB in 16 bits

at::Tensor input_gradient(
    const at::Tensor& grad, const at::Tensor& weight, const at::Tensor& weight_scale, at::ScalarType dtype) {
  constexpr const char* op = "input_gradient";
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

INT8COMPILE_LIBRARY_IMPL(m) {
  m.impl("input_gradient", &int8compile::input_gradient);
}
