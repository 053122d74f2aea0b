// Rows that end within a vector, with every kind of value and threshold: the kernels stay within the row, and compute
// what plain loops do. Operators refuse the worst of these thresholds; kernels must not depend on that.

#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "../emulated_isa/half.h"
#include "check.h"

using namespace int8compile;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();
constexpr float kMost = std::numeric_limits<float>::max(), kLeast = std::numeric_limits<float>::denorm_min();

// The CPU takes subnormal numbers for 0 and makes none, as torch.set_flush_denormal(True) has it.
class Flushing {
 public:
  explicit Flushing(bool on) {
#if defined(__SSE__)
    before_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(on ? before_ | 0x8040 : before_);
#else
    (void)on;
#endif
  }

  ~Flushing() {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(before_);
#endif
  }

  Flushing(const Flushing&) = delete;
  Flushing& operator=(const Flushing&) = delete;

 private:
  unsigned before_ = 0;
};

float value_at(const Exact<char>& x, Float type, int64_t i) {
  uint32_t bits = 0;
  std::memcpy(&bits, x.data() + i * bytes_of(type), bytes_of(type));
  if (type == Float::f16) {
    return emulated::from_half(uint16_t(bits));
  }
  bits <<= type == Float::bf16 ? 16 : 0;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

int32_t magnitude(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & 0x7fffffff;
}

// The nearest value of a dtype.
float rounded(Float type, float value) {
  if (type == Float::f32 || value != value) {
    return value;
  }
  if (type == Float::f16) {
    return emulated::from_half(emulated::to_half(value));
  }
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

bool same(float a, float b) {
  return a == b || (a != a && b != b);
}

struct Row {
  float scale = 0;
  Exact<int8_t> codes;
  Exact<uint8_t> outliers;

  explicit Row(int64_t k) : codes(k), outliers(k) {
    std::memset(codes.data(), 0x33, k);
    std::memset(outliers.data(), 0, k);
  }
};

// int8compile/ops/quantize_rowwise.py's row, an element at a time.
Row plain_row(const Exact<char>& x, Float type, int64_t k, float threshold, bool looks) {
  Row row(k);
  int32_t most = 0;
  for (int64_t i = 0; i < k; ++i) {
    const float value = value_at(x, type, i);
    row.outliers[i] = looks && std::fabs(value) >= threshold;
    if (!row.outliers[i] && magnitude(value) > most) {
      most = magnitude(value);
    }
  }
  float absmax;
  std::memcpy(&absmax, &most, sizeof(absmax));
  absmax = absmax < 0x1p-120f ? 0.0f : absmax;
  row.scale = absmax / 127.0f;
  for (int64_t i = 0; i < k; ++i) {
    const bool zero = row.outliers[i] || absmax == 0 || !(absmax <= kMost);
    row.codes[i] = zero ? 0 : int8_t(std::nearbyint(value_at(x, type, i) * ((1.0f / absmax) * 127.0f)));
  }
  return row;
}

void check_row(const Kernels& use, Random& random, Float type, int64_t k, float threshold, bool looks) {
  const Exact<char> x = floats(
      random, type, k,
      {0.0f, -0.0f, kLeast, -1e-40f, 0x1p-126f, 0x1p-121f, 6.0f, -65504.0f, kMost, kInf, -kInf, kNan});
  const Row want = plain_row(x, type, k, threshold, looks);
  Row got(k);
  got.scale = use.quantize_row(x.data(), type, k, threshold, got.codes.data(), looks ? got.outliers.data() : nullptr);
  const auto expect_equal = [&](bool equal, const char* what) {
    expect(equal, what, " of a row of ", k, " differ, dtype ", int(type), ", threshold ", threshold);
  };
  expect_equal(same(got.scale, want.scale), "scale");
  expect_equal(std::memcmp(got.codes.data(), want.codes.data(), k) == 0, "codes");
  expect_equal(std::memcmp(got.outliers.data(), want.outliers.data(), k) == 0, "outliers");

  // Every column, and those behind which nothing lies.
  for (int64_t from = 0; from < k; from += k > 4 ? k - 3 : 1) {
    Exact<int32_t> columns(k - from);
    for (int64_t i = from; i < k; ++i) {
      columns[i - from] = int32_t(i);
    }
    Exact<float> residual(k - from);
    use.residual_row(
        x.data(), type, got.codes.data(), got.scale, threshold, k - from, columns.data(), residual.data());
    for (int64_t i = from; i < k; ++i) {
      const float value = value_at(x, type, i);
      const bool carries = !(threshold > 0) || std::fabs(value) >= threshold;
      const float left = carries ? rounded(type, value - got.scale * float(got.codes[i])) : 0.0f;
      expect_equal(same(residual[i - from], left), "residuals");
    }
  }
}

}  // namespace

void check_extremes(const Kernels& use) {
  Random random;
  std::fesetround(FE_TONEAREST);
  for (const bool flushing : {false, true}) {
    const Flushing scope(flushing);
    for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
      for (const int64_t k : {0, 1, 2, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 65}) {
        for (const float threshold :
             {0.0f, -0.0f, kLeast, -kLeast, 1e-40f, 0x1p-126f, 0.5f, 6.0f, kMost, kInf, -kInf, -1.0f, kNan}) {
          check_row(use, random, type, k, threshold, true);
        }
        check_row(use, random, type, k, 0.0f, false);
      }
    }
  }
}
