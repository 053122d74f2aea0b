// The operators' schemas, for processes in which no Python has defined them: an AOTInductor package run from C++.
//
// Under Python they are int8compile/ops/*.py's, which are there before this library is loaded, and these stay unused.
// The texts are the same, and tests/programs/test_packaging.py compares them. Kernels may be registered before their
// schema is, so the order of initialisation among a library's files does not matter. Of several libraries the first
// defines them.

#include <ATen/core/dispatch/Dispatcher.h>

#include "registry.h"

namespace {

constexpr const char* kSchemas[] = {
    "linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, float threshold, "
    "str outlier_policy=\"column\", Tensor? columns=None, Tensor? column_weight=None) -> Tensor",
    "quantize_rowwise(Tensor x, float threshold) -> (Tensor, Tensor, Tensor)",
    "scaled_mm(Tensor codes, Tensor row_scale, Tensor x, Tensor? outliers, Tensor weight, Tensor weight_scale, "
    "Tensor? bias, ScalarType out_dtype, float residual_from=0.0) -> Tensor",
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool is_causal=False) -> Tensor",
    "input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, ScalarType dtype) -> Tensor",
    "grouped_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor offsets, Tensor? bias, float threshold, "
    "str outlier_policy=\"column\") -> Tensor",
    "grouped_input_gradient(Tensor grad, Tensor weight, Tensor weight_scale, Tensor offsets, ScalarType dtype) "
    "-> Tensor",
};

// Lives as long as the process: a Library takes its definitions back when it goes.
[[maybe_unused]] torch::Library* const kLibrary = []() -> torch::Library* {
  if (c10::Dispatcher::singleton().findSchema({INT8COMPILE_OP("linear"), ""}).has_value()) {
    return nullptr;
  }
  auto* library = new torch::Library(
      torch::Library::DEF, INT8COMPILE_TEXT(INT8COMPILE_NAMESPACE), std::nullopt, __FILE__, __LINE__);
  for (const char* schema : kSchemas) {
    library->def(schema, {at::Tag::pt2_compliant_tag});
  }
  return library;
}();

}  // namespace
