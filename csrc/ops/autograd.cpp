// The gradients of int8compile/ops/*.py in C++, for every device with kernels of its own: the same formulas, at a third
// of the cost of a call. Where the reference bodies serve, so do Python's gradients.
//
// A call that needs no gradient, as in every decoded token, goes straight to the kernel: that is what this file is for.
// The rest redispatches, so that fake and traced tensors take the same way.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "registry.h"

namespace int8compile {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

bool needs_gradient(const Tensor& tensor) {
  return tensor.defined() && tensor.requires_grad();
}

bool needs_gradient(const OptionalTensor& tensor) {
  return tensor.has_value() && needs_gradient(*tensor);
}

Tensor input_gradient(const Tensor& grad, const Tensor& weight, const Tensor& weight_scale, at::ScalarType dtype) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, at::ScalarType)>(INT8COMPILE_OP("input_gradient"));
  return op.call(grad, weight, weight_scale, dtype);
}

Tensor bias_gradient(const Tensor& grad, at::ScalarType dtype) {
  if (grad.dim() == 1) {
    return grad.to(dtype);
  }
  std::vector<int64_t> rows(grad.dim() - 1);
  std::iota(rows.begin(), rows.end(), 0);
  return at::sum(grad, rows, /*keepdim=*/false, at::kFloat).to(dtype);
}

// What backward needs of the operands, for linear and scaled_mm alike. Edges count the tensors among the arguments, so
// an absent one has none and moves those behind it.
void save(
    AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
    const OptionalTensor& bias, int64_t x_edge, int64_t bias_edge) {
  ctx->save_for_backward({weight, weight_scale});
  ctx->saved_data["x_edge"] = x_edge;
  ctx->saved_data["x_dtype"] = int64_t(x.scalar_type());
  ctx->saved_data["bias_edge"] = bias.has_value() ? bias_edge : int64_t(-1);
  ctx->saved_data["bias_dtype"] = int64_t(bias.has_value() ? bias->scalar_type() : at::kFloat);
}

// One for each of `arguments`, of which those at x and bias are defined where they are asked for.
variable_list gradients(AutogradContext* ctx, const Tensor& grad, size_t arguments, size_t x, size_t bias) {
  variable_list result(arguments);
  const auto number = [&](const char* name) { return ctx->saved_data[name].toInt(); };
  const auto wanted = [&](int64_t edge) { return edge >= 0 && ctx->needs_input_grad(edge); };
  if (wanted(number("x_edge"))) {
    const variable_list saved = ctx->get_saved_variables();
    result[x] = input_gradient(grad, saved[0], saved[1], at::ScalarType(number("x_dtype")));
  }
  if (wanted(number("bias_edge"))) {
    result[bias] = bias_gradient(grad, at::ScalarType(number("bias_dtype")));
  }
  return result;
}

using LinearSignature = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, c10::string_view, const OptionalTensor&,
    const OptionalTensor&);

const auto& linear_op() {
  static const auto op = find<LinearSignature>(INT8COMPILE_OP("linear"));
  return op;
}

struct Linear : Function<Linear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
      const OptionalTensor& bias, double threshold, const std::string& outlier_policy, const OptionalTensor& columns,
      const OptionalTensor& column_weight) {
    save(ctx, x, weight, weight_scale, bias, 0, 3);
    at::AutoDispatchBelowADInplaceOrView below;
    return linear_op().call(x, weight, weight_scale, bias, threshold, outlier_policy, columns, column_weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return gradients(ctx, grads[0], 8, 0, 3);
  }
};

Tensor linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, double threshold,
    c10::string_view outlier_policy, const OptionalTensor& columns, const OptionalTensor& column_weight) {
  check_no_tangent("linear", x, weight_scale, bias);
  if (at::GradMode::is_enabled() && (needs_gradient(x) || needs_gradient(bias))) {
    return Linear::apply(
        x, weight, weight_scale, bias, threshold, std::string(outlier_policy), columns, column_weight);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return linear_op().call(x, weight, weight_scale, bias, threshold, outlier_policy, columns, column_weight);
}

using ScaledMmSignature = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&,
    const OptionalTensor&, at::ScalarType, double);

const auto& scaled_mm_op() {
  static const auto op = find<ScaledMmSignature>(INT8COMPILE_OP("scaled_mm"));
  return op;
}

struct ScaledMm : Function<ScaledMm> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& codes, const Tensor& row_scale, const Tensor& x,
      const OptionalTensor& outliers, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
      int64_t out_dtype, double residual_from) {
    save(ctx, x, weight, weight_scale, bias, 2, outliers.has_value() ? 6 : 5);
    at::AutoDispatchBelowADInplaceOrView below;
    return scaled_mm_op().call(
        codes, row_scale, x, outliers, weight, weight_scale, bias, at::ScalarType(out_dtype), residual_from);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    return gradients(ctx, grads[0], 9, 2, 6);
  }
};

Tensor scaled_mm(
    const Tensor& codes, const Tensor& row_scale, const Tensor& x, const OptionalTensor& outliers,
    const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, at::ScalarType out_dtype,
    double residual_from) {
  check_no_tangent("scaled_mm", row_scale, x, weight_scale, bias);
  if (at::GradMode::is_enabled() && (needs_gradient(x) || needs_gradient(bias))) {
    return ScaledMm::apply(
        codes, row_scale, x, outliers, weight, weight_scale, bias, int64_t(out_dtype), residual_from);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return scaled_mm_op().call(codes, row_scale, x, outliers, weight, weight_scale, bias, out_dtype, residual_from);
}

using GroupedLinearSignature = Tensor(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, c10::string_view);

const auto& grouped_linear_op() {
  static const auto op = find<GroupedLinearSignature>(INT8COMPILE_OP("grouped_linear"));
  return op;
}

Tensor grouped_input_gradient(
    const Tensor& grad, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets, at::ScalarType dtype) {
  using Signature = Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, at::ScalarType);
  static const auto op = find<Signature>(INT8COMPILE_OP("grouped_input_gradient"));
  return op.call(grad, weight, weight_scale, offsets, dtype);
}

// Sums over each expert's rows; expert_of_rows of int8compile/ops/grouped_linear.py says whose a row is.
Tensor grouped_bias_gradient(const Tensor& grad, const Tensor& offsets, at::ScalarType dtype) {
  const int64_t experts = offsets.size(0), rows = grad.size(0);
  if (experts == 0) {
    return at::zeros({0, grad.size(1)}, grad.options().dtype(dtype));
  }
  const Tensor ends = std::get<0>(at::cummax(offsets.clamp(0, rows), 0));
  const Tensor expert = at::searchsorted(ends, at::arange(rows, ends.options()), /*out_int32=*/false, /*right=*/true);
  const Tensor sums = at::zeros({experts + 1, grad.size(1)}, grad.options().dtype(at::kFloat));
  return sums.index_add(0, expert, grad.to(at::kFloat)).slice(0, 0, experts).to(dtype);
}

struct GroupedLinear : Function<GroupedLinear> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets,
      const OptionalTensor& bias, double threshold, const std::string& outlier_policy) {
    ctx->save_for_backward({weight, weight_scale, offsets});
    ctx->saved_data["x_dtype"] = int64_t(x.scalar_type());
    ctx->saved_data["bias_dtype"] = int64_t(bias.has_value() ? bias->scalar_type() : at::kFloat);
    ctx->saved_data["has_bias"] = bias.has_value();
    at::AutoDispatchBelowADInplaceOrView below;
    return grouped_linear_op().call(x, weight, weight_scale, offsets, bias, threshold, outlier_policy);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(7);
    const variable_list saved = ctx->get_saved_variables();
    if (ctx->needs_input_grad(0)) {
      const auto dtype = at::ScalarType(ctx->saved_data["x_dtype"].toInt());
      result[0] = grouped_input_gradient(grads[0], saved[0], saved[1], saved[2], dtype);
    }
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(4)) {
      const auto dtype = at::ScalarType(ctx->saved_data["bias_dtype"].toInt());
      result[4] = grouped_bias_gradient(grads[0], saved[2], dtype);
    }
    return result;
  }
};

Tensor grouped_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& offsets,
    const OptionalTensor& bias, double threshold, c10::string_view outlier_policy) {
  check_no_tangent("grouped_linear", x, weight_scale, bias);
  if (at::GradMode::is_enabled() && (needs_gradient(x) || needs_gradient(bias))) {
    return GroupedLinear::apply(x, weight, weight_scale, offsets, bias, threshold, std::string(outlier_policy));
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return grouped_linear_op().call(x, weight, weight_scale, offsets, bias, threshold, outlier_policy);
}

// Codes, scales and columns carry no gradient; scaled_mm takes it to x.
std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(const Tensor& x, double threshold) {
  using Signature = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, double);
  static const auto op = find<Signature>(INT8COMPILE_OP("quantize_rowwise"));
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(x, threshold);
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_GRADIENTS(m) {
  m.impl("linear", &int8compile::linear);
  m.impl("scaled_mm", &int8compile::scaled_mm);
  m.impl("grouped_linear", &int8compile::grouped_linear);
  m.impl("quantize_rowwise", &int8compile::quantize_rowwise);
}
