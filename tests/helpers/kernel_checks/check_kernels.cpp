// The functions of a provider, one by one.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>

#include "../../../csrc/cpu/plan.h"
#include "../emulated_isa/half.h"
#include "check.h"

using namespace int8compile;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN(), kInf = std::numeric_limits<float>::infinity();

std::string shape(int64_t rows, int64_t cols, int64_t k) {
  return std::to_string(rows) + " x " + std::to_string(k) + " x " + std::to_string(cols);
}

// [rows, k] codes, `gap` bytes between rows, none behind the last. kind: random, or all the same.
Exact<int8_t> codes(Random& random, int64_t rows, int64_t k, int64_t gap, int kind) {
  Exact<int8_t> made(rows == 0 ? 0 : (rows - 1) * (k + gap) + k);
  for (int8_t& code : made) {
    code = int8_t(kind == 0 ? random.below(256) - 128 : kind);
  }
  return made;
}

// As product.cpp does it.
void multiply(const Multiplier& use, Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
  const Packing* packing = use.packing;
  if (packing == nullptr) {
    return use.multiply(a, b, rows, cols, k, sums);
  }
  const int64_t bytes = packing->row_bytes(k), blocks = (rows + kPackRows - 1) / kPackRows;
  Exact<int8_t> packed(blocks * kPackRows * bytes);
  for (int64_t row = 0; row < rows; row += kPackRows) {
    packing->pack(
        {a.data + row * a.stride, a.stride}, std::min(kPackRows, rows - row), k, packed.data() + row * bytes);
  }
  packing->begin();
  use.multiply({packed.data(), bytes}, b, rows, cols, k, sums);
  packing->end();
}

void check_multiply(const Kernels& use, Random& random, int64_t rows, int64_t cols, int64_t k, int left, int right) {
  const int64_t a_gap = random.one_of({0, 0, 3}), b_gap = random.one_of({0, 0, 1, 37});
  const Exact<int8_t> a = codes(random, rows, k, a_gap, left), b = codes(random, cols, k, b_gap, right);
  Exact<int32_t> row_sums(rows);
  const bool summed = use.row_sum != nullptr && random.below(2) == 0;
  for (int64_t i = 0; summed && i < rows; ++i) {
    const int8_t* row = a.data() + i * (k + a_gap);
    row_sums[i] = use.row_sum(row, k);
    expect(row_sums[i] == std::accumulate(row, row + k, 0), "row_sum of ", k, " codes: ", row_sums[i]);
  }
  const Codes left_codes = {a.data(), k + a_gap, summed ? row_sums.data() : nullptr};
  std::vector<Exact<int32_t>> sums;
  std::vector<const char*> names;
  for (int method = 0; method < kMethods; ++method) {
    if (use.multipliers.can(Method(method), k)) {
      names.push_back(name_of(Method(method)));
      sums.emplace_back(rows * kTileCols);
      std::fill(sums.back().begin(), sums.back().end(), 0x55555555);
      multiply(use.multipliers.of[method], left_codes, {b.data(), k + b_gap}, rows, cols, k, sums.back().data());
      expect(tiles_are_released(), "multiply: the tiles are not released");
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      int64_t want = 0;
      for (int64_t c = 0; c < k; ++c) {
        want += int64_t(a[i * (k + a_gap) + c]) * b[j * (k + b_gap) + c];
      }
      for (size_t method = 0; method < sums.size(); ++method) {
        const int32_t got = sums[method][i * kTileCols + j];
        expect(
            got == want, "multiply ", shape(rows, cols, k), " at ", i, ", ", j, " by ", names[method], ": ", got,
            ", not ", want);
      }
    }
  }
}

void check_products(const Kernels& use, Random& random) {
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 17, 31, 33, 48, 97, 192}) {
    for (const int64_t cols : {1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 48, 49, 80, 95, 96}) {
      for (const int64_t k : {0, 1, 2, 3, 4, 31, 32, 33, 63, 64, 65, 127, 130, 449, 704, 705, 1500, 4161}) {
        const int64_t work = rows * cols * k;
        if (work < 15000 || random.below(work < 100000 ? 4 : work < 1200000 ? 40 : 1000000) == 0) {
          check_multiply(use, random, rows, cols, k, 0, 0);
        }
      }
    }
  }
  for (const int left : {127, -127, -128}) {
    for (const int right : {127, -127, -128}) {
      check_multiply(use, random, 7, 19, 1030, left, right);
      check_multiply(use, random, 2, 9, 130, left, right);
    }
  }
  for (const int64_t rows : {1, 5}) {
    check_multiply(use, random, rows, 2, 131072, -128, 127);  // as large as sums get
    check_multiply(use, random, rows, 2, 131072, 127, 127);
    check_multiply(use, random, rows, 2, 25001, 0, 0);
  }
}

struct Row {
  float scale = 0;
  Exact<int8_t> codes;
  Exact<uint8_t> outliers;
  Exact<float> residual;

  Row(const Kernels& use, const Exact<char>& x, Float type, int64_t k, float threshold, float from,
      const std::vector<int32_t>& columns)
      : codes(k), outliers(k), residual(int64_t(columns.size())) {
    std::memset(outliers.data(), 0, k);
    scale = use.quantize_row(x.data(), type, k, threshold, codes.data(), threshold > 0 ? outliers.data() : nullptr);
    use.residual_row(
        x.data(), type, codes.data(), scale, from, residual.size(), columns.data(), residual.data());
  }
};

struct CalibratedRow {
  float scale = 0;
  Exact<int8_t> codes, high;

  CalibratedRow(
      const Kernels& use, const Exact<char>& x, Float type, int64_t k, const std::vector<int32_t>& columns)
      : codes(k), high(int64_t(columns.size())) {
    Exact<uint8_t> flags(k / 8 + 5);
    std::memset(flags.data(), 0, flags.size());
    for (const int32_t c : columns) {
      flags[c / 8] |= uint8_t(1 << c % 8);
    }
    const WideColumns wide = {int64_t(columns.size()), columns.data(), flags.data()};
    scale = use.quantize_calibrated_row(x.data(), type, k, wide, codes.data(), high.data());
  }
};

template <class T>
bool same(const Exact<T>& a, const Exact<T>& b) {
  return a.size() == b.size() &&
      std::equal(a.begin(), a.end(), b.begin(), [](T p, T q) { return p == q || (p != p && q != q); });
}

void check_row(const Kernels& use, Random& random, Float type, int64_t k, float threshold, float odd) {
  const Exact<char> x = floats(random, type, k, odd == 0 ? std::vector<float>() : std::vector<float>{odd});
  std::vector<int32_t> columns;
  const int64_t every = random.one_of({1, 2, 9});
  for (int64_t c = 0; c < k; ++c) {
    if (random.below(every) == 0) {
      columns.push_back(int32_t(c));
    }
  }
  for (const float from : {0.0f, threshold}) {
    const Row got(use, x, type, k, threshold, from, columns);
    const Row want(*portable_kernels(), x, type, k, threshold, from, columns);
    expect(
        got.scale == want.scale || (std::isnan(got.scale) && std::isnan(want.scale)), "scale ", got.scale, ", not ",
        want.scale, ", k ", k, ", dtype ", int(type), ", with ", odd);
    expect(same(got.codes, want.codes), "codes differ, k ", k, ", dtype ", int(type), ", with ", odd);
    expect(same(got.outliers, want.outliers), "outliers differ, k ", k, ", dtype ", int(type), ", with ", odd);
    expect(same(got.residual, want.residual), "residuals differ, k ", k, ", dtype ", int(type), ", with ", odd);
  }
  const CalibratedRow got(use, x, type, k, columns), want(*portable_kernels(), x, type, k, columns);
  expect(
      (got.scale == want.scale || (std::isnan(got.scale) && std::isnan(want.scale))) && same(got.codes, want.codes) &&
          same(got.high, want.high),
      "quantize_calibrated_row differs, k ", k, ", dtype ", int(type), ", with ", odd);
}

void check_finish(const Kernels& use, Random& random, int64_t rows, int64_t cols, int64_t count, Float type) {
  const int64_t k = 40, stride = cols + random.below(3);
  const Exact<int8_t> weight = codes(random, cols, k, 0, 0);
  Exact<int32_t> sums(rows * kTileCols + 1), columns(count);
  Exact<float> row_scale(rows), weight_scale(cols), residual(rows * count);
  Exact<float> gathered(count * ((cols + kStrip - 1) / kStrip * kStrip));
  for (int32_t& sum : sums) {
    sum = int32_t(random.below(200001) - 100000);
  }
  for (float& value : row_scale) {
    value = random.below(20) == 0 ? random.one_of({kNan, kInf, 0.0f, 3e35f}) : std::fabs(random.normal());
  }
  for (float& value : weight_scale) {
    value = std::fabs(random.normal()) * 0.01f;
  }
  for (float& value : residual) {
    value = random.normal();
  }
  for (int32_t& column : columns) {
    column = int32_t(random.below(k));
  }
  const Float bias_type = random.one_of({Float::f32, type});
  const Exact<char> bias = floats(random, bias_type, cols, {});
  Exact<char> got(((rows - 1) * stride + cols) * bytes_of(type)), want(got.size());
  Tile tile = {
      rows, cols, sums.data(), row_scale.data(), {weight.data(), k}, weight_scale.data(),
      random.below(2) == 0 ? nullptr : bias.data(), bias_type, {count, columns.data(), residual.data()},
      gathered.data(), nullptr, stride, type,
  };
  const bool wide = random.below(2) == 0;
  tile.high_sums = wide ? sums.data() + random.below(2) : nullptr;  // (any others would do)
  tile.out = got.data();
  std::memset(got.data(), 0x11, got.size());
  use.finish(tile);
  // The outlier product fuses its multiplications and additions; with it taken out, the portable provider's bits.
  Exact<float> product(rows * cols);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {
      float sum = 0;
      for (int64_t t = 0; t < count; ++t) {
        sum = std::fma(residual[i * count + t], float(weight[j * k + columns[t]]), sum);
      }
      product[i * cols + j] = sum;
    }
  }
  std::memset(want.data(), 0x11, want.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) {  // one element at a time, its product as one outlier column of weight 1
      const int8_t one = 1;
      const int32_t first = 0;
      Tile element = tile;
      element.rows = element.cols = 1;
      element.sums = &sums[i * kTileCols + j];
      int32_t padded[kTileCols] = {*element.sums};
      element.sums = padded;
      int32_t padded_high[kTileCols] = {wide ? tile.high_sums[i * kTileCols + j] : 0};
      element.high_sums = wide ? padded_high : nullptr;
      element.row_scale = &row_scale[i];
      element.weight = {&one, 1};
      element.weight_scale = &weight_scale[j];
      element.bias = tile.bias == nullptr ? nullptr : bias.data() + j * bytes_of(bias_type);
      float space[kStrip];
      element.outliers = {count > 0, &first, &product[i * cols + j]};
      element.gathered = space;
      element.out = want.data() + (i * stride + j) * bytes_of(type);
      portable_kernels()->finish(element);
    }
  }
  expect(
      std::memcmp(got.data(), want.data(), got.size()) == 0, "finish ", rows, " x ", cols, ", ", count,
      " outlier columns, dtype ", int(type), ": outputs differ");
}

// A tile of the product of float rows: against sums in double, and each row against itself alone.
void check_float_product(const Kernels& use, Random& random, int64_t rows, int64_t cols, int64_t k, Float type) {
  const int64_t padded = (k + kFloatStep - 1) / kFloatStep * kFloatStep, gap = random.one_of({0, 0, 1, 37});
  const int64_t stride = cols + random.below(3);
  const Exact<int8_t> weight = codes(random, cols, k, gap, 0);
  const Exact<char> x = floats(random, type, rows * k, {});
  const Exact<char> bias = floats(random, type, cols, {});
  Exact<float> wide(rows * padded), scale(cols), scratch(kFloatScratch);
  for (int64_t i = 0; i < rows; ++i) {
    use.widen_row(x.data() + i * k * bytes_of(type), type, k, wide.data() + i * padded);
    for (int64_t c = k; c < padded; ++c) {
      expect(wide[i * padded + c] == 0, "widen_row: no zero behind ", k);
    }
  }
  for (float& value : scale) {
    value = std::fabs(random.normal()) * 0.01f;
  }
  std::fill(scratch.begin(), scratch.end(), kNan);
  Exact<float> got((rows - 1) * stride + cols), alone(cols);
  FloatTile tile = {
      rows, cols, k, wide.data(), padded, {weight.data(), k + gap}, scale.data(),
      random.below(2) == 0 ? nullptr : bias.data(), type, scratch.data(), got.data(), stride, Float::f32,
  };
  use.float_product(tile);
  tile.rows = 1;
  tile.out = alone.data();
  for (int64_t i = 0; i < rows; ++i) {
    tile.x = wide.data() + i * padded;
    use.float_product(tile);
    for (int64_t j = 0; j < cols; ++j) {
      double sum = 0, terms = 0;
      for (int64_t c = 0; c < k; ++c) {
        const double term = double(wide[i * padded + c]) * weight[j * (k + gap) + c];
        sum += term;
        terms += std::fabs(term);
      }
      float offset[1] = {0};
      if (tile.bias != nullptr) {
        float space[kFloatStep];
        portable_kernels()->widen_row(bias.data() + j * bytes_of(type), type, 1, space);
        offset[0] = space[0];
      }
      const double want = sum * scale[j] + offset[0];
      const double bound = (terms * scale[j] + std::fabs(offset[0])) * (k + 4) * 0x1p-24 + 1e-30;
      const float value = got[i * stride + j];
      expect(
          std::fabs(value - want) <= bound, "float_product ", shape(rows, cols, k), " at ", i, ", ", j, ": ", value,
          ", not ", want);
      expect(value == alone[j], "float_product ", shape(rows, cols, k), ": row ", i, " differs alone");
    }
  }
}

void check_float_products(const Kernels& use, Random& random) {
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 13, 48}) {
    for (const int64_t cols : {1, 2, 15, 16, 17, 33, 96}) {
      for (const int64_t k : {0, 1, 15, 16, 17, 64, 130, 1024, 1041, 2080}) {
        if (rows * cols * k < 3000 || random.below(rows * cols * k < 100000 ? 6 : 60) == 0) {
          check_float_product(use, random, rows, cols, k, Float(random.below(3)));
        }
      }
    }
  }
  check_float_product(use, random, 1, 5, 4500, Float::bf16);
  check_float_product(use, random, 13, 20, 2100, Float::f16);
}

}  // namespace

Exact<char> floats(Random& random, Float type, int64_t count, const std::vector<float>& odd) {
  Exact<char> made(count * bytes_of(type));
  for (int64_t i = 0; i < count; ++i) {
    float value = random.normal() * (random.below(10) == 0 ? 8.0f : 1.0f);
    if (!odd.empty() && random.below(count) < 2) {
      value = odd[random.below(int64_t(odd.size()))];
    }
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint16_t half = type == Float::f16 ? emulated::to_half(value) : uint16_t(bits >> 16);
    const void* from = type == Float::f32 ? static_cast<const void*>(&bits) : &half;
    std::memcpy(made.data() + i * bytes_of(type), from, bytes_of(type));
  }
  return made;
}

void check_kernels(const Kernels& use) {
  Random random;
  check_products(use, random);
  check_float_products(use, random);
  for (const Float type : {Float::f32, Float::bf16, Float::f16}) {
    for (const float odd : {0.0f, kNan, kInf, -kInf, 65504.0f, 1e38f, 1e-38f, 1e-45f, 0x1p-121f, -0.0f}) {
      for (const int64_t k : {1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 100, 577}) {
        check_row(use, random, type, k, random.one_of({0.0f, 6.0f, 0.5f, 0x1p-126f, 70000.0f, kInf}), odd);
      }
    }
    for (const int64_t count : {0, 1, 3, 17, 70}) {
      if (count > 0 && use.finish == portable_kernels()->finish) {
        break;  // which does not fuse
      }
      for (int i = 0; i < 6; ++i) {
        check_finish(use, random, 1 + random.below(20), 1 + random.below(kTileCols), count, type);
      }
      check_finish(use, random, 8, 32, count, type);
    }
  }
}
