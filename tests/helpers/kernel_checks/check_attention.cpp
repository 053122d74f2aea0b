// Whole calls of attention, with threads, against plain loops in double, on memory of exactly the right size.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <ATen/Parallel.h>

#include "../../../csrc/cpu/attention.h"
#include "../../../csrc/cpu/attention_check.h"
#include "../emulated_isa/half.h"
#include "check.h"

using namespace int8compile;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

float number(const Exact<char>& values, Float type, int64_t at) {
  if (type == Float::f32) {
    float value;
    std::memcpy(&value, values.data() + 4 * at, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, values.data() + 2 * at, 2);
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return type == Float::f16 ? emulated::from_half(half) : value;
}

struct Case {
  int64_t batch, kv_heads, group, queries, keys, width, value_width;
  Float type;
  int mask;  // 0: none, 1: causal, 2: a tensor of booleans, 3: of numbers for each head, 4: of booleans for all queries
};

bool visible(const Case& c, int64_t query, int64_t key) {
  return c.mask == 1 ? key <= query : c.mask == 2 ? (key + query) % 7 != 3 && key <= query + 60 : key < c.keys - 3;
}

void check_case(const AttentionKernels& use, Random& random, const Case& c) {
  const int64_t heads = c.kv_heads * c.group, gap = random.below(3);
  const auto length = [&](int64_t rows, int64_t width) { return rows == 0 ? 0 : (rows - 1) * (width + gap) + width; };
  const Exact<char> query = floats(random, c.type, length(c.batch * heads * c.queries, c.width), {});
  const Exact<char> key = floats(random, c.type, length(c.batch * c.kv_heads * c.keys, c.width), {});
  const Exact<char> value = floats(random, c.type, length(c.batch * c.kv_heads * c.keys, c.value_width), {});
  const Exact<char> added = floats(random, c.type, c.mask == 3 ? heads * c.queries * c.keys : 0, {-kInf});
  Exact<uint8_t> seen(c.mask == 2 ? c.queries * c.keys : c.mask == 4 ? c.keys : 0);
  for (int64_t i = 0; i < seen.size(); ++i) {
    seen[i] = visible(c, i / std::max<int64_t>(c.keys, 1), i % std::max<int64_t>(c.keys, 1));
  }
  Exact<char> out(c.batch * heads * c.queries * c.value_width * bytes_of(c.type));
  Attention call = {};
  call.batch = c.batch;
  call.heads = heads;
  call.kv_heads = c.kv_heads;
  call.queries = c.queries;
  call.keys = c.keys;
  call.width = c.width;
  call.value_width = c.value_width;
  call.type = c.type;
  const int64_t q = c.width + gap, v = c.value_width + gap;
  call.query = {query.data(), heads * c.queries * q, c.queries * q, q};
  call.key = {key.data(), c.kv_heads * c.keys * q, c.keys * q, q};
  call.value = {value.data(), c.kv_heads * c.keys * v, c.keys * v, v};
  call.out = {out.data(), heads * c.queries * c.value_width, c.value_width, heads * c.value_width};
  call.mask_type = c.mask == 3 ? MaskType::added : c.mask == 2 || c.mask == 4 ? MaskType::boolean : MaskType::none;
  if (c.mask == 3) {
    call.mask = {added.data(), 0, c.queries * c.keys, c.keys};
  } else if (c.mask != 1 && c.mask != 0) {
    call.mask = {seen.data(), 0, 0, c.mask == 2 ? c.keys : 0};
  }
  call.scale = 0.3f;
  call.causal = c.mask == 1;
  attend(use, call);
  const double bound = c.type == Float::f32 ? 1e-5 : c.type == Float::bf16 ? 3e-2 : 4e-3;
  Exact<double> scores(c.keys);
  for (int64_t row = 0; row < c.batch * heads * c.queries; ++row) {
    const int64_t batch = row / (heads * c.queries), head = row / c.queries % heads, m = row % c.queries;
    const int64_t first = (batch * c.kv_heads + head / c.group) * c.keys;
    double most = -kInf, total = 0, largest = 1;
    for (int64_t n = 0; n < c.keys; ++n) {
      double sum = 0;
      for (int64_t d = 0; d < c.width; ++d) {
        sum += double(number(query, c.type, row * q + d)) * number(key, c.type, (first + n) * q + d);
      }
      scores[n] = sum * call.scale;
      if (c.mask == 3) {
        scores[n] += number(added, c.type, (head * c.queries + m) * c.keys + n);
      } else if (c.mask != 0 && !visible(c, m, n)) {
        scores[n] = -kInf;
      }
      most = std::max(most, scores[n]);
    }
    for (int64_t n = 0; n < c.keys; ++n) {
      scores[n] = most == -kInf ? 0 : std::exp(scores[n] - most);
      total += scores[n];
    }
    for (int64_t d = 0; d < c.value_width; ++d) {
      double want = 0;
      for (int64_t n = 0; n < c.keys; ++n) {
        const double element = number(value, c.type, (first + n) * v + d);
        want += total == 0 ? 0 : scores[n] / total * element;
        largest = std::max(largest, std::fabs(element));
      }
      const float got = number(out, c.type, ((batch * c.queries + m) * heads + head) * c.value_width + d);
      expect(
          std::fabs(got - want) <= bound * largest, "attention ", double(c.queries), " x ", double(c.keys), ", width ",
          double(c.width), " and ", double(c.value_width), ", dtype ", double(int(c.type)), ", mask ", double(c.mask),
          " at ", double(m), ", ", double(d), ": ", got, ", not ", want);
    }
  }
}

}  // namespace

void check_attention(const AttentionKernels& use) {
  Random random;
  for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
    if (!use.takes(type)) {
      continue;
    }
    for (int mask = 0; mask < 5; ++mask) {
      for (int i = 0; i < 8; ++i) {
        Case c = {};
        c.batch = 1 + random.below(2);
        c.kv_heads = 1 + random.below(2);
        c.group = 1 + random.below(3);
        c.queries = random.one_of<int64_t>({1, 2, 7, 19, 50});
        c.keys = random.one_of<int64_t>({0, 1, 15, 17, 64, 65, 131});
        c.width = random.one_of<int64_t>({1, 3, 8, 16, 31, 64, 65});
        c.value_width = random.one_of<int64_t>({1, 7, 16, 40, 64});
        c.type = type;
        c.mask = mask;
        at::threads() = int(1 + random.below(3));
        check_case(use, random, c);
      }
    }
  }
  at::threads() = 1;
  expect(agrees_with_portable(use), "attention's check rejects ", use.name);
}
