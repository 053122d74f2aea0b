// What operators check of their arguments, the same as int8compile/ops/*.py: each check names the operator, the argument,
// its value and what was expected. All tensors have to be on the activation's device.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#define INT8COMPILE_CHECK(condition, op, ...) TORCH_CHECK_VALUE(condition, "int8compile::", op, ": ", __VA_ARGS__)

namespace int8compile {

using OptionalTensor = std::optional<at::Tensor>;

// Up to here int32 sums of products of codes are exact (127 * 127 * K < 2^31).
constexpr int64_t kMaxInFeatures = 131072;

inline bool is_float(at::ScalarType type) {
  return type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
}

inline bool has_tangent(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->_fw_grad(/*level=*/0).defined();
}

// Forward-mode derivatives, which a kernel would drop without a word.
template <class... Operands>
void check_no_tangent(const char* op, const Operands&... operands) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(has_tangent(operands) || ...), "int8compile::", op,
      ": an operand has a forward-mode tangent (torch.func.jvp, jacfwd, forward_ad); an int8 linear has gradients for "
      "backward passes only");
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

// The [..., N] that a weight [N, K] makes of an activation [..., K].
inline at::Tensor empty_output(const at::Tensor& x, const at::Tensor& weight, at::ScalarType dtype) {
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(0);
  return at::empty(sizes, x.options().dtype(dtype));
}

inline void check_activation(const char* op, const at::Tensor& x) {
  INT8COMPILE_CHECK(x.dim() >= 1, op, "x is a scalar; expected a tensor of shape [..., K]");
  INT8COMPILE_CHECK(
      is_float(x.scalar_type()), op, "x has dtype ", x.scalar_type(), "; expected float32, float16 or bfloat16");
}

// A magnitude that activations are compared with: 0, or one that is above 0 as a float, too, even where subnormal numbers
// are flushed to 0, which every activation reaches.
inline float checked_threshold(const char* op, const char* name, double value, const char* meaning_of_0) {
  INT8COMPILE_CHECK(
      value == 0 || value >= 0x1p-126, op, name, "=", value, "; expected 0 (", meaning_of_0,
      ") or at least 2**-126 (1.2e-38)");
  static_assert(std::numeric_limits<float>::is_iec559, "what no float reaches becomes infinity");
  return static_cast<float>(value);
}

inline float checked_threshold(const char* op, double threshold) {
  return checked_threshold(op, "threshold", threshold, "no outliers");
}

inline float checked_residual_from(const char* op, double residual_from) {
  return checked_threshold(op, "residual_from", residual_from, "whole columns");
}

// Policies that every operator knows; `more` is another that this one knows.
inline void check_outlier_policy(const char* op, c10::string_view outlier_policy, const char* more = nullptr) {
  bool known = more != nullptr && outlier_policy == more;
  for (const char* policy : {"column", "element", "none", "all"}) {
    known = known || outlier_policy == policy;
  }
  INT8COMPILE_CHECK(
      known, op, "outlier_policy='", outlier_policy, "'; expected one of 'column', 'element', 'none', 'all'",
      more == nullptr ? "" : std::string(", '") + more + "'");
}

// What activations are compared with; 0 under a policy that compares none.
inline float threshold_of(const char* op, double threshold, c10::string_view outlier_policy) {
  const float least = checked_threshold(op, threshold);
  return outlier_policy == "column" || outlier_policy == "element" ? least : 0.0f;
}

inline const char* given(const OptionalTensor& tensor) {
  return tensor.has_value() ? "given" : "absent";
}

// The columns of policy "calibrated" and their weight, of which there are none under another.
inline void check_columns(
    const char* op, const at::Tensor& x, const at::Tensor& weight, c10::string_view outlier_policy,
    const OptionalTensor& columns, const OptionalTensor& column_weight) {
  const bool calibrated = outlier_policy == "calibrated";
  INT8COMPILE_CHECK(
      columns.has_value() == calibrated && (calibrated || !column_weight.has_value()), op, "outlier_policy='",
      outlier_policy, "' with columns ", given(columns), " and column_weight ", given(column_weight),
      "; expected columns with policy 'calibrated', and neither with any other");
  if (!calibrated) {
    return;
  }
  INT8COMPILE_CHECK(
      columns->dim() == 1 && columns->scalar_type() == at::kInt && columns->device() == x.device(), op, "columns is ",
      columns->scalar_type(), " ", columns->sizes(), " on ", columns->device(), "; expected int32 [C] on ", x.device(),
      ", features in ascending order");
  if (column_weight.has_value()) {
    check_tensor(
        op, "column_weight", *column_weight, x, at::kChar, {weight.size(0), columns->size(0)},
        ", which is weight[:, columns]");
  }
}

inline void check_weight(
    const char* op, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
    const OptionalTensor& bias) {
  const int64_t k = x.size(-1);
  INT8COMPILE_CHECK(
      weight.dim() == 2 && weight.scalar_type() == at::kChar && weight.device() == x.device(), op, "weight is ",
      weight.scalar_type(), " ", weight.sizes(), " on ", weight.device(), "; expected int8 [N, K] on ", x.device(),
      " (quantize_weight makes one)");
  INT8COMPILE_CHECK(
      weight.size(1) == k, op, "weight is ", weight.sizes(), ", so it takes ", weight.size(1), " features, but x has ",
      k);
  INT8COMPILE_CHECK(
      k <= kMaxInFeatures, op, "in_features=", k, " is more than ", kMaxInFeatures,
      ", up to which int32 sums are exact: split the weight along K");
  check_tensor(op, "weight_scale", weight_scale, x, at::kFloat, {weight.size(0)});
  if (bias.has_value()) {
    INT8COMPILE_CHECK(
        bias->device() == x.device() && bias->dim() == 1 && bias->size(0) == weight.size(0), op, "bias is ",
        bias->sizes(), " on ", bias->device(), "; expected [", weight.size(0), "] on ", x.device());
  }
}

}  // namespace int8compile
