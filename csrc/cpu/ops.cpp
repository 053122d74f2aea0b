// linear, quantize_rowwise and scaled_mm for CPU tensors: argument checks, then product.cpp, or
// weight_only.cpp where nothing is quantised.
//
// The schemas are int8compile/ops/*.py's, and so is the meaning; the checks here are the same as theirs.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <string>
#include <tuple>

#include "../ops/checks.h"
#include "../ops/registry.h"
#include "product.h"
#include "tensors.h"
#include "weight_only.h"

namespace int8compile {
namespace {

using at::Tensor;

// The operands as the kernels take them. Holds what had to be copied: a weight whose rows are contiguous is used as it
// is, in whatever tensor they lie.
struct Operands {
  Tensor weight, weight_scale, bias;
  Product product;

  Operands(const Tensor& w, const Tensor& w_scale, const OptionalTensor& b, Tensor& out)
      : weight(w.stride(1) == 1 || w.size(1) <= 1 ? w : w.contiguous()), weight_scale(w_scale.contiguous()) {
    if (b.has_value()) {
      bias = (is_float(b->scalar_type()) ? *b : b->to(at::kFloat)).contiguous();
    }
    product.cols = weight.size(0);
    product.weight = {weight.const_data_ptr<int8_t>(), weight.stride(0)};
    product.weight_scale = weight_scale.const_data_ptr<float>();
    product.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    product.bias_type = bias.defined() ? float_type(bias.scalar_type()) : Float::f32;
    product.out = out.mutable_data_ptr();
    product.out_type = float_type(out.scalar_type());
  }
};

// Columns twice would be multiplied twice, and memory beside the activation read.
void check_ascending(const char* op, const Tensor& columns, int64_t k) {
  const auto* at = columns.const_data_ptr<int32_t>();
  for (int64_t i = 0, before = -1; i < columns.size(0); before = at[i++]) {
    INT8COMPILE_CHECK(
        at[i] > before && at[i] < k, op, "columns[", i, "]=", at[i], "; expected features below ", k,
        ", in ascending order, each once");
  }
}

Tensor linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, double threshold,
    c10::string_view outlier_policy, const OptionalTensor& columns, const OptionalTensor& column_weight) {
  check_activation("linear", x);
  const float least = threshold_of("linear", threshold, outlier_policy);
  check_outlier_policy("linear", outlier_policy, "calibrated");
  check_weight("linear", x, weight, weight_scale, bias);
  check_columns("linear", x, weight, outlier_policy, columns, column_weight);
  const Tensor values = x.contiguous();
  Tensor out = empty_output(x, weight, x.scalar_type());
  const Operands operands(weight, weight_scale, bias, out);
  if (outlier_policy == "all") {
    weight_only_linear(activation(values), operands.product);
    return out;
  }
  if (outlier_policy == "calibrated") {
    const Tensor at = columns->contiguous();
    const Tensor codes = column_weight.has_value() ? column_weight->contiguous() : Tensor();
    check_ascending("linear", at, x.size(-1));
    const int8_t* copied = codes.defined() ? codes.const_data_ptr<int8_t>() : nullptr;
    const Columns wide = {at.size(0), at.const_data_ptr<int32_t>(), {copied, at.size(0)}};
    calibrated_linear(activation(values), wide, operands.product);
    return out;
  }
  const float residual_from = outlier_policy == "element" ? least : 0.0f;
  quantized_linear(activation(values), least > 0, least, residual_from, operands.product);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(const Tensor& x, double threshold) {
  check_activation("quantize_rowwise", x);
  const float least = checked_threshold("quantize_rowwise", threshold);
  const Tensor values = x.contiguous();
  const Activation rows = activation(values);
  Tensor codes = at::empty({rows.rows, rows.k}, x.options().dtype(at::kChar));
  Tensor scale = at::empty({rows.rows}, x.options().dtype(at::kFloat));
  Tensor outliers = at::empty({rows.k}, x.options().dtype(at::kBool));
  auto* flags = static_cast<uint8_t*>(outliers.mutable_data_ptr());
  if (least == 0) {
    outliers.zero_();
    flags = nullptr;
  }
  quantize_rows(rows, least, codes.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(), flags);
  return {codes, scale, outliers};
}

Tensor scaled_mm(
    const Tensor& codes, const Tensor& row_scale, const Tensor& x, const OptionalTensor& outliers,
    const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, at::ScalarType out_dtype,
    double residual_from) {
  constexpr const char* op = "scaled_mm";
  check_activation(op, x);
  const int64_t m = rows_of(x), k = x.size(-1);
  check_tensor(op, "codes", codes, x, at::kChar, {m, k}, " (quantize_rowwise makes it)");
  check_tensor(op, "row_scale", row_scale, x, at::kFloat, {m}, " (quantize_rowwise makes it)");
  if (outliers.has_value()) {
    check_tensor(op, "outliers", *outliers, x, at::kBool, {k}, " (quantize_rowwise makes it)");
  }
  check_weight(op, x, weight, weight_scale, bias);
  INT8COMPILE_CHECK(is_float(out_dtype), op, "out_dtype=", out_dtype, "; expected float32, float16 or bfloat16");
  const float least = checked_residual_from(op, residual_from);

  const Tensor rows = codes.contiguous(), scales = row_scale.contiguous();
  const Tensor values = outliers.has_value() ? x.contiguous() : x;  // read for residuals alone
  const Tensor flags = outliers.has_value() ? outliers->contiguous() : Tensor();
  Tensor out = empty_output(x, weight, out_dtype);
  const Operands operands(weight, weight_scale, bias, out);
  scaled_product(
      activation(values), rows.const_data_ptr<int8_t>(), scales.const_data_ptr<float>(),
      flags.defined() ? static_cast<const uint8_t*>(flags.const_data_ptr()) : nullptr, least,
      operands.product);
  return out;
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_KERNELS(m) {
  m.impl("linear", &int8compile::linear);
  m.impl("quantize_rowwise", &int8compile::quantize_rowwise);
  m.impl("scaled_mm", &int8compile::scaled_mm);
}
