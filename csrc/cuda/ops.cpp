// linear, quantize_rowwise and scaled_mm for CUDA tensors: argument checks and memory, then run.cpp.
// (A linear of which the weight alone is int8 is torch's product of floats. One whose columns are calibrated is quantised by
// torch, and multiplied by two of our products.)
//
// The schemas are int8compile/ops/*.py's, and so is the meaning; the checks here are the same as theirs. Compiled by the
// host's compiler alone. Scratch memory comes from torch's caching allocator, on the current stream, and goes back when
// the call returns: later work on this stream may take it, which is in order, and in a CUDA graph it lies in the
// graph's own pool.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../ops/checks.h"
#include "../ops/registry.h"
#include "run.h"
#include "stream.h"

namespace int8compile {
namespace {

using at::Tensor;

Float float_type(at::ScalarType type) {
  return type == at::kFloat ? Float::f32 : type == at::kHalf ? Float::f16 : Float::bf16;
}

Activation activation(const Tensor& x) {
  return {x.const_data_ptr(), float_type(x.scalar_type()), rows_of(x), x.size(-1)};
}

std::atomic<bool> use_wgmma{false};
std::atomic<const std::string*> forced_kernel{nullptr};

Choice choice() {
  const std::string* forced = forced_kernel.load();
  return {use_wgmma.load(std::memory_order_relaxed), forced == nullptr ? nullptr : forced->c_str()};
}

// The operands as the kernels take them. Holds what had to be copied: a weight whose rows are contiguous is used as it
// is, in whatever tensor they lie.
struct Operands {
  Tensor weight, weight_scale, bias;
  Product product{};

  Operands(const Tensor& w, const Tensor& w_scale, const OptionalTensor& b, Tensor& out)
      : weight(w.stride(1) == 1 || w.size(1) <= 1 ? w : w.contiguous()), weight_scale(w_scale.contiguous()) {
    if (b.has_value()) {
      bias = (is_float(b->scalar_type()) ? *b : b->to(at::kFloat)).contiguous();
    }
    product.cols = weight.size(0);
    product.weight = weight.const_data_ptr<int8_t>();
    product.weight_stride = weight.stride(0);
    product.weight_scale = weight_scale.const_data_ptr<float>();
    product.bias = bias.defined() ? bias.const_data_ptr() : nullptr;
    product.bias_type = bias.defined() ? float_type(bias.scalar_type()) : Float::f32;
    product.out = out.mutable_data_ptr();
    product.out_type = float_type(out.scalar_type());
  }
};

Tensor scratch_memory(int64_t bytes, const Tensor& x) {
  return at::empty({bytes}, x.options().dtype(at::kByte));
}

void check_launch(const char* op, cudaError_t error) {
  TORCH_CHECK(error == cudaSuccess, "int8compile::", op, ": CUDA error: ", cudaGetErrorString(error));
}

// The weight alone is int8 (policy "all"): torch's product in fp32, as in the reference body. The weight is widened for
// the length of the call, four times its bytes.
Tensor weight_only_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias) {
  Tensor out = x.to(at::kFloat).matmul(weight.to(at::kFloat).t()).mul(weight_scale);
  if (bias.has_value()) {
    out = out.add(bias->to(at::kFloat));
  }
  return out.to(x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> quantize_rowwise(const Tensor& x, double threshold) {
  constexpr const char* op = "quantize_rowwise";
  check_activation(op, x);
  const float least = checked_threshold(op, threshold);
  const c10::DeviceGuard guard(x.device());
  const Tensor values = x.contiguous();
  const Activation rows = activation(values);
  Tensor codes = at::empty({rows.rows, rows.k}, x.options().dtype(at::kChar));
  Tensor scale = at::empty({rows.rows}, x.options().dtype(at::kFloat));
  Tensor flags = at::empty({rows.k}, x.options().dtype(at::kBool));
  // With threshold 0 no row sets a flag.
  const Quantized q{
      codes.mutable_data_ptr<int8_t>(), scale.mutable_data_ptr<float>(),
      static_cast<uint8_t*>(flags.mutable_data_ptr())};
  check_launch(op, run_quantize(rows, least, q, current_stream(x.device())));
  return {codes, scale, flags};
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

  const c10::DeviceGuard guard(x.device());
  const Tensor rows = codes.contiguous(), scales = row_scale.contiguous();
  const Tensor values = outliers.has_value() ? x.contiguous() : x;  // read for residuals alone
  const Tensor flags = outliers.has_value() ? outliers->contiguous() : Tensor();
  Tensor out = empty_output(x, weight, out_dtype);
  const Operands operands(weight, weight_scale, bias, out);
  const Problem problem{activation(values), operands.product, {0.0f, least}, choice()};
  const Quantized quantized{
      const_cast<int8_t*>(rows.const_data_ptr<int8_t>()), const_cast<float*>(scales.const_data_ptr<float>()),
      flags.defined() ? static_cast<uint8_t*>(const_cast<void*>(flags.const_data_ptr())) : nullptr};
  const Gpu gpu = current_gpu();
  const Tensor scratch = scratch_memory(product_scratch(problem, quantized, gpu), x);
  check_launch(op, run_product(problem, quantized, gpu, scratch.mutable_data_ptr(), current_stream(x.device())));
  return out;
}

// The sums of codes [M, K] times the transpose of codes [N, K], as floats [M, N].
Tensor sums_of(const Tensor& codes, const Tensor& weight) {
  const Tensor like = codes.to(at::kFloat), ones = at::ones({weight.size(0)}, like.options());
  return scaled_mm(
      codes, at::ones({codes.size(0)}, like.options()), like, std::nullopt, weight, ones, std::nullopt, at::kFloat, 0);
}

Tensor largest_of_rows(const Tensor& values) {
  return values.size(1) == 0 ? at::zeros({values.size(0)}, values.options()) : values.abs().amax(1);
}

// The reference body of policy "calibrated", step by step and so to the bit.
Tensor calibrated_linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, const Tensor& columns,
    const Tensor& column_weight) {
  const Tensor values = x.reshape({rows_of(x), x.size(-1)}).to(at::kFloat), at = columns.to(at::kLong);
  const Tensor outside = largest_of_rows(values.index_fill(1, at, 0.0)),
               inside = largest_of_rows(values.index_select(1, at)).div(128.0);
  Tensor absmax = at::maximum(outside, inside);
  absmax = absmax.masked_fill(absmax.lt(0x1p-120), 0.0);
  const Tensor inverse = absmax.reciprocal().mul(127.0).masked_fill(absmax.eq(0.0), 0.0);
  const Tensor codes = values.mul(inverse.unsqueeze(1)).round().nan_to_num(0.0);
  const Tensor whole = codes.index_select(1, at);
  const Tensor high = whole.add(64.0).div(128.0).floor();
  const Tensor low = codes.index_copy(1, at, whole.sub(high.mul(128.0))).to(at::kChar);
  const Tensor sums = sums_of(low, weight).add(sums_of(high.to(at::kChar), column_weight).mul(128.0));
  Tensor out = sums.mul(absmax.div(127.0).unsqueeze(1)).mul(weight_scale);
  if (bias.has_value()) {
    out = out.add(bias->to(at::kFloat));
  }
  at::DimVector sizes(x.sizes());
  sizes.back() = weight.size(0);
  return out.to(x.scalar_type()).reshape(sizes);
}

Tensor linear(
    const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias, double threshold,
    c10::string_view outlier_policy, const OptionalTensor& columns, const OptionalTensor& column_weight) {
  constexpr const char* op = "linear";
  check_activation(op, x);
  const float least = threshold_of(op, threshold, outlier_policy);
  check_outlier_policy(op, outlier_policy, "calibrated");
  check_weight(op, x, weight, weight_scale, bias);
  check_columns(op, x, weight, outlier_policy, columns, column_weight);
  const c10::DeviceGuard guard(x.device());
  if (outlier_policy == "all") {
    return weight_only_linear(x, weight, weight_scale, bias);
  }
  if (outlier_policy == "calibrated") {
    const Tensor copied = column_weight.has_value() ? *column_weight : weight.index_select(1, *columns);
    return calibrated_linear(x, weight, weight_scale, bias, *columns, copied);
  }
  const Tensor values = x.contiguous();
  Tensor out = empty_output(x, weight, x.scalar_type());
  const Operands operands(weight, weight_scale, bias, out);
  const Problem problem{
      activation(values), operands.product, {least, outlier_policy == "element" ? least : 0.0f}, choice()};
  const Gpu gpu = current_gpu();
  const Tensor scratch = scratch_memory(linear_scratch(problem, gpu), x);
  check_launch(op, run_linear(problem, gpu, scratch.mutable_data_ptr(), current_stream(x.device())));
  return out;
}

void enable_wgmma(bool enabled) {
  use_wgmma = enabled;
}

void force_cuda_kernel(const std::string name) {
  TORCH_CHECK_VALUE(
      name == "auto" || is_kernel_name(name), "int8compile_native::force_cuda_kernel: name is '", name,
      "'; expected auto or a name of plan.cpp's table");
  // A few bytes a call are left behind on purpose: another thread may be reading the name.
  forced_kernel = name == "auto" ? nullptr : new std::string(name);
}

// The dispatch table, for aligned operands of a GPU described by its capability (90) and multiprocessors.
std::string cuda_kernel(int64_t m, int64_t n, int64_t k, int64_t capability, int64_t multiprocessors, bool quantized) {
  const Gpu gpu{0, static_cast<int>(multiprocessors), static_cast<int>(capability)};
  return name_of(plan({m, n, k, k > 0 && k % 16 == 0, !quantized}, gpu, {use_wgmma.load(), nullptr}));
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_LIBRARY(m) {
  m.def("enable_wgmma(bool enabled) -> ()", &int8compile::enable_wgmma);
  m.def("force_cuda_kernel(str name) -> ()", &int8compile::force_cuda_kernel);
  m.def(
      "cuda_kernel(int m, int n, int k, int capability, int multiprocessors, bool quantized) -> str",
      &int8compile::cuda_kernel);
}

INT8COMPILE_KERNELS(m) {
  m.impl("linear", &int8compile::linear);
  m.impl("quantize_rowwise", &int8compile::quantize_rowwise);
  m.impl("scaled_mm", &int8compile::scaled_mm);
}
