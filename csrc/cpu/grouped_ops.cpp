// grouped_linear and grouped_input_gradient for CPU tensors. Offsets are read here, where that costs nothing.
//
// The schemas are int8compile/ops/grouped_linear.py's, and so is the meaning; the checks here are the same as theirs.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "../ops/checks.h"
#include "../ops/registry.h"
#include "grouped.h"
#include "tensors.h"

namespace int8compile {
namespace {

using at::Tensor;

void check_experts(
    const char* op, const Tensor& like, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets) {
  INT8COMPILE_CHECK(
      weight.dim() == 3 && weight.scalar_type() == at::kChar && weight.device() == like.device(), op, "weight is ",
      weight.scalar_type(), " ", weight.sizes(), " on ", weight.device(), "; expected int8 [E, N, K] on ",
      like.device());
  INT8COMPILE_CHECK(
      weight.size(2) <= kMaxInFeatures, op, "in_features=", weight.size(2), " is more than ", kMaxInFeatures,
      ", up to which int32 sums are exact: split the weight along K");
  check_tensor(op, "weight_scale", weight_scale, like, at::kFloat, weight.sizes().slice(0, 2));
  check_tensor(op, "offsets", offsets, like, at::kInt, weight.sizes().slice(0, 1), ", where each expert's rows end");
}

std::vector<Group> groups_in(const Tensor& offsets, int64_t rows) {
  const Tensor ends = offsets.contiguous();
  return groups_of(ends.const_data_ptr<int32_t>(), ends.numel(), rows);
}

Tensor grouped_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets,
    const OptionalTensor& bias, double threshold, c10::string_view outlier_policy) {
  constexpr const char* op = "grouped_linear";
  check_activation(op, x);
  const float least = threshold_of(op, threshold, outlier_policy);
  check_outlier_policy(op, outlier_policy);
  check_experts(op, x, weight, weight_scale, offsets);
  INT8COMPILE_CHECK(x.dim() == 2, op, "x is ", x.sizes(), "; expected [S, K], the rows sorted by expert");
  INT8COMPILE_CHECK(
      weight.size(2) == x.size(1), op, "weight is ", weight.sizes(), ", so it takes ", weight.size(2),
      " features, but x has ", x.size(1));
  const int64_t rows = x.size(0), cols = weight.size(1);
  if (bias.has_value()) {
    INT8COMPILE_CHECK(
        bias->device() == x.device() && bias->sizes() == weight.sizes().slice(0, 2), op, "bias is not [",
        weight.size(0), ", ", cols, "]");
  }

  const Tensor values = x.contiguous(), scale = weight_scale.contiguous();
  const Tensor codes = weight.stride(2) == 1 || weight.size(2) <= 1 ? weight : weight.contiguous();
  const Tensor added =
      !bias.has_value() ? Tensor() : (is_float(bias->scalar_type()) ? *bias : bias->to(at::kFloat)).contiguous();
  const std::vector<Group> groups = groups_in(offsets, rows);
  Tensor out = at::empty({rows, cols}, x.options());
  const int64_t done = groups.empty() ? 0 : groups.back().end;
  if (done < rows) {
    out.slice(0, done, rows).zero_();
  }
  Experts experts;
  experts.cols = cols;
  experts.weight = codes.const_data_ptr<int8_t>();
  experts.expert_stride = codes.stride(0);
  experts.row_stride = codes.stride(1);
  experts.weight_scale = scale.const_data_ptr<float>();
  experts.bias = added.defined() ? added.const_data_ptr() : nullptr;
  experts.bias_type = added.defined() ? float_type(added.scalar_type()) : Float::f32;
  experts.out = out.mutable_data_ptr();
  if (outlier_policy == "all") {
    weight_only_groups(activation(values), groups, experts);
    return out;
  }
  const float residual_from = outlier_policy == "element" ? least : 0.0f;
  quantized_groups(activation(values), groups, least > 0, least, residual_from, experts);
  return out;
}

Tensor grouped_input_gradient(
    const Tensor& grad, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets, at::ScalarType dtype) {
  constexpr const char* op = "grouped_input_gradient";
  check_no_tangent(op, grad, weight_scale);
  check_experts(op, grad, weight, weight_scale, offsets);
  const int64_t n = weight.size(1);
  INT8COMPILE_CHECK(
      grad.dim() == 2 && is_float(grad.scalar_type()) && grad.size(1) == n, op, "grad is ", grad.scalar_type(), " ",
      grad.sizes(), "; expected float32, float16 or bfloat16 [S, ", n, "]");
  INT8COMPILE_CHECK(is_float(dtype), op, "dtype=", dtype, "; expected float32, float16 or bfloat16");
  using OfOne = Tensor(const Tensor&, const Tensor&, const Tensor&, at::ScalarType);
  static const auto of_one = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow(INT8COMPILE_OP("input_gradient"), "")
                                 .typed<OfOne>();
  Tensor out = at::zeros({grad.size(0), weight.size(2)}, grad.options().dtype(dtype));
  for (const Group& group : groups_in(offsets, grad.size(0))) {
    const Tensor rows = grad.slice(0, group.begin, group.end);
    out.slice(0, group.begin, group.end)
        .copy_(of_one.call(rows, weight.select(0, group.expert), weight_scale.select(0, group.expert), dtype));
  }
  return out;
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_KERNELS(m) {
  m.impl("grouped_linear", &int8compile::grouped_linear);
  m.impl("grouped_input_gradient", &int8compile::grouped_input_gradient);
}
