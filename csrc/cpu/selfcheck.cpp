// Each function of a provider against the portable one's, to the bit. (The outlier product, which may be rounded in
// another way, is left out.)
//
// CPUID has said that the instructions are there. What is guarded against is a provider that was built by a compiler
// it has never been built by, or that runs on a CPU, or under an emulator, that it has never run on.

#include "selfcheck.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace int8compile {
namespace {

class Random {
 public:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state_ >> 33);
  }

  std::vector<int8_t> codes(int64_t count) {
    std::vector<int8_t> made(count);
    for (int8_t& code : made) {
      code = int8_t(next());
    }
    return made;
  }

  // About 1/8 to 32 of either sign, in three dtypes.
  void floats(int64_t count, std::vector<uint32_t>& f32, std::vector<uint16_t>& bf16, std::vector<uint16_t>& f16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t sign = next() & 1, power = next() % 8, fraction = next();
      f32.push_back(sign << 31 | (124 + power) << 23 | (fraction & 0x7fffff));
      bf16.push_back(uint16_t(f32.back() >> 16));
      f16.push_back(uint16_t(sign << 15 | (12 + power) << 10 | (fraction & 0x3ff)));
    }
  }

 private:
  uint64_t state_ = 1;
};

std::vector<int32_t> product(
    const Multiplier& multiplier, const std::vector<int8_t>& a, const std::vector<int8_t>& b, int64_t rows,
    int64_t cols, int64_t k) {
  std::vector<int32_t> sums(rows * kTileCols);
  const Packing* packing = multiplier.packing;
  if (packing == nullptr) {
    multiplier.multiply({a.data(), k}, {b.data(), k}, rows, cols, k, sums.data());
  } else {
    const int64_t bytes = packing->row_bytes(k), padded = (rows + kPackRows - 1) / kPackRows * kPackRows;
    std::vector<int8_t> memory(padded * bytes + 64);
    int8_t* packed = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64);
    for (int64_t row = 0; row < rows; row += kPackRows) {
      packing->pack({a.data() + row * k, k}, std::min(kPackRows, rows - row), k, packed + row * bytes);
    }
    packing->begin();
    multiplier.multiply({packed, bytes}, {b.data(), k}, rows, cols, k, sums.data());
    packing->end();
  }
  for (int64_t row = 0; row < rows; ++row) {  // what lies behind the columns is nobody's
    std::fill(sums.begin() + row * kTileCols + cols, sums.begin() + (row + 1) * kTileCols, 0);
  }
  return sums;
}

bool same_products(const Kernels& use) {
  constexpr struct {
    int64_t rows, cols, k;
  } shapes[] = {
      {1, 21, 333}, {4, 9, 64}, {7, 40, 130}, {16, 96, 64}, {21, 51, 769}, {50, 17, 1500}, {6, 3, 5}, {131, 69, 531},
  };
  Random random;
  for (const auto& shape : shapes) {
    const std::vector<int8_t> a = random.codes(shape.rows * shape.k), b = random.codes(shape.cols * shape.k);
    const Multiplier& portable = portable_kernels()->multipliers[Method::widened];
    const std::vector<int32_t> want = product(portable, a, b, shape.rows, shape.cols, shape.k);
    for (int i = 0; i < kMethods; ++i) {
      if (use.multipliers.can(Method(i), shape.k) &&
          product(use.multipliers.of[i], a, b, shape.rows, shape.cols, shape.k) != want) {
        return false;
      }
    }
  }
  return true;
}

// Floats that are small integers: their products' sums are exact, whatever the order.
std::vector<float> float_product(const Kernels& use, int64_t rows, int64_t cols, int64_t k) {
  Random random;
  const int64_t stride = (k + kFloatStep - 1) / kFloatStep * kFloatStep;
  const std::vector<int8_t> small = random.codes(rows * k), weight = random.codes(cols * k);
  std::vector<float> x(rows * stride), scratch(kFloatScratch), out(rows * cols), scale(cols, 0.125f);
  std::vector<float> row(k);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t c = 0; c < k; ++c) {
      row[c] = float(small[i * k + c] / 16);
    }
    use.widen_row(row.data(), Float::f32, k, x.data() + i * stride);
  }
  use.float_product(
      {rows, cols, k, x.data(), stride, {weight.data(), k}, scale.data(), scale.data(), Float::f32, scratch.data(),
       out.data(), cols, Float::f32});
  return out;
}

bool same_float_products(const Kernels& use) {
  constexpr struct {
    int64_t rows, cols, k;
  } shapes[] = {{1, 21, 333}, {4, 16, 64}, {7, 40, 130}, {47, 96, 1200}};
  for (const auto& shape : shapes) {
    if (float_product(use, shape.rows, shape.cols, shape.k) !=
        float_product(*portable_kernels(), shape.rows, shape.cols, shape.k)) {
      return false;
    }
  }
  return true;
}

std::vector<float> widened(const Kernels& use, const void* x, Float type, int64_t k) {
  std::vector<float> made((k + kFloatStep - 1) / kFloatStep * kFloatStep);
  use.widen_row(x, type, k, made.data());
  return made;
}

struct Quantized {
  float scale;
  std::vector<int8_t> codes;
  std::vector<uint8_t> outliers;
  std::vector<float> residual;
  float calibrated_scale;
  std::vector<int8_t> calibrated, high;

  Quantized(const Kernels& use, const void* x, Float type, int64_t k)
      : codes(k), outliers(k), residual(k), calibrated(k), high(k / 3) {
    scale = use.quantize_row(x, type, k, 6.0f, codes.data(), outliers.data());
    std::vector<int32_t> columns;
    for (int64_t i = 0; i < k; ++i) {
      columns.push_back(int32_t(i));
    }
    use.residual_row(x, type, codes.data(), scale, 0.0f, k, columns.data(), residual.data());
    columns.resize(k / 3);
    std::vector<uint8_t> flags(k / 8 + 5);
    for (int32_t& column : columns) {
      column *= 3;
      flags[column / 8] |= uint8_t(1 << column % 8);
    }
    const WideColumns wide = {k / 3, columns.data(), flags.data()};
    calibrated_scale = use.quantize_calibrated_row(x, type, k, wide, calibrated.data(), high.data());
  }

  bool operator==(const Quantized& o) const {
    return scale == o.scale && codes == o.codes && outliers == o.outliers && residual == o.residual &&
        calibrated_scale == o.calibrated_scale && calibrated == o.calibrated && high == o.high;
  }
};

std::vector<uint8_t> finished(const Kernels& use, Float bias_type, const void* bias, Float out_type) {
  constexpr int64_t rows = 11, cols = 37;
  Random random;
  std::vector<int32_t> sums(rows * kTileCols);
  std::vector<float> row_scale, weight_scale;
  for (int32_t& sum : sums) {
    sum = int32_t(random.next() % 2000001) - 1000000;
  }
  for (int64_t i = 0; i < cols; ++i) {
    row_scale.push_back(float(1 + random.next() % 1000) * 0x1p-13f);
    weight_scale.push_back(float(1 + random.next() % 1000) * 0x1p-17f);
  }
  const int8_t none = 0;
  std::vector<uint8_t> out(rows * cols * (out_type == Float::f32 ? 4 : 2));
  Tile tile = {
      rows, cols, sums.data(), row_scale.data(), {&none, 0}, weight_scale.data(), bias, bias_type, {}, nullptr,
      out.data(), cols, out_type,
  };
  tile.high_sums = sums.data();
  use.finish(tile);
  return out;
}

bool same_rows(const Kernels& use) {
  constexpr int64_t k = 203;
  std::vector<uint32_t> f32;
  std::vector<uint16_t> bf16, f16;
  Random().floats(k, f32, bf16, f16);
  const Kernels& portable = *portable_kernels();
  const auto same = [&](Float type, const void* values) {
    return Quantized(use, values, type, k) == Quantized(portable, values, type, k) &&
        finished(use, type, values, type) == finished(portable, type, values, type) &&
        widened(use, values, type, k) == widened(portable, values, type, k);
  };
  return same(Float::f32, f32.data()) && same(Float::bf16, bf16.data()) && same(Float::f16, f16.data());
}

}  // namespace

bool agrees_with_portable(const Kernels& use) {
  return same_products(use) && same_float_products(use) && same_rows(use);
}

}  // namespace int8compile
