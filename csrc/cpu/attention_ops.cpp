// attention for CPU tensors: argument checks, the choice of kernels, then attention.cpp.
//
// The schema is int8compile/ops/attention.py's, and so is the meaning; the checks here are the same as there.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../ops/checks.h"
#include "../ops/registry.h"
#include "attention.h"
#include "attention_providers.h"

namespace int8compile {
namespace {

using at::Tensor;

constexpr const char* kOp = "attention";

Float float_type(at::ScalarType type) {
  return type == at::kFloat ? Float::f32 : type == at::kHalf ? Float::f16 : Float::bf16;
}

void check_heads(const Tensor& query, const Tensor& key, const Tensor& value) {
  INT8COMPILE_CHECK(
      is_float(query.scalar_type()), kOp, "query has dtype ", query.scalar_type(),
      "; expected float32, float16 or bfloat16");
  INT8COMPILE_CHECK(query.dim() == 4, kOp, "query is ", query.sizes(), "; expected [B, H, M, D]");
  const int64_t batch = query.size(0), heads = query.size(1), width = query.size(3);
  const auto check = [&](const char* name, const Tensor& tensor, bool fits, const char* expected) {
    INT8COMPILE_CHECK(
        fits && tensor.scalar_type() == query.scalar_type() && tensor.device() == query.device(), kOp, name, " is ",
        tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device(), "; for query ", query.scalar_type(), " ",
        query.sizes(), " on ", query.device(), " expected ", expected);
  };
  const bool key_fits = key.dim() == 4 && key.size(0) == batch && key.size(3) == width &&
      (key.size(1) == 0 ? heads == 0 : heads % key.size(1) == 0);
  check("key", key, key_fits, "[B, Hkv, N, D] of its dtype, H being a multiple of Hkv");
  const bool value_fits = value.dim() == 4 && value.sizes().slice(0, 3) == key.sizes().slice(0, 3);
  check("value", value, value_fits, "[B, Hkv, N, Dv] of its dtype, as key is");
}

void check_mask(const Tensor& query, const Tensor& key, const Tensor& mask, bool is_causal) {
  INT8COMPILE_CHECK(!is_causal, kOp, "is_causal=True and a mask; expected one of the two");
  const int64_t sizes[] = {query.size(0), query.size(1), query.size(2), key.size(2)};
  bool fits = mask.dim() >= 2 && mask.dim() <= 4 && mask.device() == query.device() &&
      (mask.scalar_type() == at::kBool || mask.scalar_type() == query.scalar_type());
  for (int64_t i = 1; fits && i <= mask.dim(); ++i) {
    fits = mask.size(-i) == 1 || mask.size(-i) == sizes[4 - i];
  }
  INT8COMPILE_CHECK(
      fits, kOp, "mask is ", mask.scalar_type(), " ", mask.sizes(), " on ", mask.device(), "; expected bool or ",
      query.scalar_type(), " on ", query.device(), ", of 2 to 4 dimensions that broadcast to ", at::IntArrayRef(sizes));
}

// A tensor whose rows can be read as they lie: the same one, if they can.
Tensor with_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// The distances between elements, 0 where a dimension is broadcast.
Heads heads_of(const Tensor& tensor) {
  const auto stride = [&](int64_t dim) { return tensor.size(dim) == 1 ? 0 : tensor.stride(dim); };
  return {tensor.const_data_ptr(), stride(0), stride(1), stride(2)};
}

// [B | 1, H | 1, M | 1, N]
Tensor whole_mask(const Tensor& mask, int64_t keys) {
  Tensor whole = mask;
  while (whole.dim() < 4) {
    whole = whole.unsqueeze(0);
  }
  return with_rows(whole.size(3) == keys ? whole : whole.expand({-1, -1, -1, keys}));
}

Tensor attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, double scale,
    bool is_causal) {
  check_heads(query, key, value);
  if (mask.has_value()) {
    check_mask(query, key, *mask, is_causal);
  }
  const Tensor q = with_rows(query), k = with_rows(key), v = with_rows(value);
  const Tensor m = mask.has_value() ? whole_mask(*mask, key.size(2)) : Tensor();
  Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
  Attention call = {};
  call.batch = q.size(0);
  call.heads = q.size(1);
  call.kv_heads = k.size(1);
  call.queries = q.size(2);
  call.keys = k.size(2);
  call.width = q.size(3);
  call.value_width = v.size(3);
  call.type = float_type(q.scalar_type());
  call.query = heads_of(q);
  call.key = heads_of(k);
  call.value = heads_of(v);
  call.out = heads_of(out);
  if (m.defined()) {
    call.mask_type = m.scalar_type() == at::kBool ? MaskType::boolean : MaskType::added;
    call.mask = heads_of(m);
  }
  call.scale = float(scale);
  call.causal = is_causal;
  attend(attention_kernels(call.type), call);
  return out;
}

bool wants_gradient(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() && tensor->requires_grad();
}

Tensor without_gradient(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask, double scale,
    bool is_causal) {
  const bool recorded = at::GradMode::is_enabled() &&
      (wants_gradient(query) || wants_gradient(key) || wants_gradient(value) || wants_gradient(mask));
  const bool tangents = has_tangent(query) || has_tangent(key) || has_tangent(value) || has_tangent(mask);
  TORCH_CHECK_NOT_IMPLEMENTED(
      !recorded && !tangents, "int8compile::attention has no gradient, and an operand needs one; call it under "
      "torch.no_grad(), or torch.nn.functional.scaled_dot_product_attention");
  using Signature =
      Tensor(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("int8compile::attention", "").typed<Signature>();
  at::AutoDispatchBelowADInplaceOrView below;
  return op.call(query, key, value, mask, scale, is_causal);
}

}  // namespace
}  // namespace int8compile

INT8COMPILE_KERNELS(m) {
  m.impl("attention", &int8compile::attention);
}

INT8COMPILE_GRADIENTS(m) {
  m.impl("attention", &int8compile::without_gradient);
}
