// As selfcheck.cpp, with a tolerance: sums of floats in another order, and weights rounded to bfloat16.

#include "attention_check.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace int8compile {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kKeys = 151, kWidth = 43, kValueWidth = 38;

// `count` numbers of about -2 to 2, cut to the dtype.
struct Numbers {
  std::vector<float> f32;
  std::vector<uint16_t> bits;

  Numbers(int64_t count, Float type, uint64_t state) {
    for (int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      float value = (float(state >> 40) * 0x1p-24f - 0.5f) * 4.0f;
      uint32_t word;
      std::memcpy(&word, &value, sizeof(word));
      const uint32_t half = (word & 0x80000000u) >> 16 | ((word >> 23 & 255) - 112) << 10 | (word >> 13 & 1023);
      const bool small = (word >> 23 & 255) <= 112;
      f32.push_back(value);
      bits.push_back(uint16_t(type == Float::bf16 ? word >> 16 : small ? 0 : half));
    }
  }

  const void* data(Float type) const {
    return type == Float::f32 ? static_cast<const void*>(f32.data()) : bits.data();
  }
};

std::vector<float> attended(
    const AttentionKernels& use, Float type, MaskType mask_type, bool causal, int64_t queries) {
  const Numbers query(kHeads * queries * kWidth, type, 1), key(kKvHeads * kKeys * kWidth, type, 2);
  const Numbers value(kKvHeads * kKeys * kValueWidth, type, 3), added(queries * kKeys, type, 4);
  std::vector<uint8_t> visible(queries * kKeys);
  for (int64_t i = 0; i < queries * kKeys; ++i) {
    visible[i] = i % kKeys < 70 + i / kKeys;
  }
  std::vector<float> out(kHeads * queries * kValueWidth);
  std::vector<uint16_t> bits(out.size());
  void* to = type == Float::f32 ? static_cast<void*>(out.data()) : bits.data();
  Attention call = {};
  call.batch = 1;
  call.heads = kHeads;
  call.kv_heads = kKvHeads;
  call.queries = queries;
  call.keys = kKeys;
  call.width = kWidth;
  call.value_width = kValueWidth;
  call.type = type;
  call.query = {query.data(type), 0, queries * kWidth, kWidth};
  call.key = {key.data(type), 0, kKeys * kWidth, kWidth};
  call.value = {value.data(type), 0, kKeys * kValueWidth, kValueWidth};
  call.out = {to, 0, queries * kValueWidth, kValueWidth};
  call.mask_type = mask_type;
  call.mask = {mask_type == MaskType::boolean ? visible.data() : added.data(type), 0, 0, kKeys};
  call.scale = 0.2f;
  call.causal = causal;
  std::vector<MaskSummary> summaries((kKeys + kKeyBlock - 1) / kKeyBlock);
  std::vector<char> memory(use.scratch_bytes(call, queries) + 64);
  QueryBlock block = {};
  block.call = &call;
  block.count = queries;
  block.mask_heads = 1;
  block.scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
  if (mask_type != MaskType::none) {
    use.summarize(call, 0, 0, 0, queries, summaries.data());
    block.summaries = summaries.data();
  }
  for (block.kv_head = 0; block.kv_head < kKvHeads; ++block.kv_head) {
    use.attend(block);
  }
  for (size_t i = 0; i < out.size() && type != Float::f32; ++i) {
    const uint32_t half = bits[i], size = half & 0x7fff;
    uint32_t word = half << 16;
    if (type == Float::f16) {
      word = (half & 0x8000) << 16 | (size < 0x400 ? 0 : (size << 13) + (112u << 23));
    }
    std::memcpy(&out[i], &word, sizeof(word));
  }
  return out;
}

}  // namespace

bool agrees_with_portable(const AttentionKernels& use) {
  for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
    const float bound = type == Float::f32 ? 1e-5f : type == Float::bf16 ? 3e-2f : 4e-3f;
    for (const MaskType mask : {MaskType::none, MaskType::boolean, MaskType::added}) {
      const bool causal = mask == MaskType::none && type == Float::bf16;
      if (!use.takes(type)) {
        continue;
      }
      for (const int64_t queries : {9, 3}) {  // many rows, and few
        const std::vector<float> got = attended(use, type, mask, causal, queries);
        const std::vector<float> want = attended(*portable_attention(), type, mask, causal, queries);
        for (size_t i = 0; i < got.size(); ++i) {
          if (!(std::fabs(got[i] - want[i]) <= bound)) {
            return false;
          }
        }
      }
    }
  }
  return true;
}

}  // namespace int8compile
