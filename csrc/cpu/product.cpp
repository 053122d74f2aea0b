// Threads, tiles and scratch memory; the arithmetic is in kernels().
//
// Work is split over columns first: then each weight is read by one thread, and an activation, which is the smaller,
// by all. Rows are split only where there are fewer strips of columns than threads. No number depends on the split:
// the sums are exact integers and the epilogue works on one output element at a time.
//
// Scratch memory is the codes (a byte an element of x, two where the provider packs them), the residuals in outlier
// columns, and, a thread, a tile of sums and its weights in outlier columns.

#include "product.h"

#include "plan.h"
#include "scratch.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

namespace int8compile {
namespace {

constexpr int64_t kQuantizeGrain = 32768;  // elements worth a thread
constexpr int64_t kPackGrain = 131072;  // codes worth a thread
constexpr int64_t kProductGrain = 131072;  // multiplications worth a thread
constexpr int64_t kPanelFromRows = 4;  // of high bytes

// The indices of the bytes that are set, which are few; returns how many.
int64_t list_columns(const uint8_t* flags, int64_t k, int32_t* columns) {
  int64_t count = 0;
  int64_t at = 0;
  for (; at + 8 <= k; at += 8) {
    uint64_t eight;
    std::memcpy(&eight, flags + at, sizeof(eight));
    if (eight == 0) {
      continue;
    }
    for (int64_t i = at; i < at + 8; ++i) {
      columns[count] = int32_t(i);
      count += flags[i] != 0;
    }
  }
  for (; at < k; ++at) {
    if (flags[at] != 0) {
      columns[count++] = int32_t(at);
    }
  }
  return count;
}

// The left operand of a product: row-major codes, or packed for the method that the plan has for all of them.
struct Operand {
  const Kernels* use;
  Sizes sizes;
  const Multiplier* multiplier;
  Codes codes;
  bool one_method = false;  // whatever the rows

  const Packing* packing() const {
    return multiplier->packing;
  }

  // For a tile of some of the rows. They may be too few for the method of all of them, unless they are packed for it.
  const Multiplier& of_rows(int64_t rows) const {
    if (rows == sizes.rows || one_method || packing() != nullptr) {
      return *multiplier;
    }
    const Multiplier& own = use->multipliers[plan(*use, {rows, sizes.cols, sizes.k, sizes.threads})];
    return own.packing == nullptr ? own : *multiplier;
  }
};

void pack(const Packing& packing, const Sizes& of, const int8_t* codes, int64_t row_bytes, int8_t* packed) {
  const int64_t grain = divide_up(kPackGrain, kPackRows * std::max<int64_t>(of.k, 1));
  at::parallel_for(0, divide_up(of.rows, kPackRows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kPackRows; row < std::min(of.rows, end * kPackRows); row += kPackRows) {
      packing.pack({codes + row * of.k, of.k}, std::min(kPackRows, of.rows - row), of.k, packed + row * row_bytes);
    }
  });
}

void fill_row_sums(const Kernels& use, const Sizes& of, const int8_t* codes, int32_t* sums) {
  at::parallel_for(0, of.rows, divide_up(kPackGrain, std::max<int64_t>(of.k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      sums[m] = use.row_sum(codes + m * of.k, of.k);
    }
  });
}

// Codes [rows, k] as the method wants them: packed, or as they are, with the sums of their rows if it has a use for them.
class Arranged {
 public:
  Arranged(const Kernels& use, const Sizes& sizes, const Multiplier& multiplier, const int8_t* codes)
      : operand_{&use, sizes, &multiplier, {codes, sizes.k}},
        row_sums_(has_sums() ? sizes.rows : 0), packed_(divide_up(sizes.rows, kPackRows) * kPackRows * row_bytes()) {
    if (operand_.packing() != nullptr) {
      pack(*operand_.packing(), sizes, codes, row_bytes(), packed_.data());
      operand_.codes = {packed_.data(), row_bytes()};
    } else if (has_sums()) {
      fill_row_sums(use, sizes, codes, row_sums_.data());
      operand_.codes.row_sums = row_sums_.data();
    }
  }

  Operand& operator*() {
    return operand_;
  }

 private:
  bool has_sums() const {
    return operand_.packing() == nullptr && operand_.use->row_sum != nullptr;
  }

  int64_t row_bytes() const {
    return operand_.packing() == nullptr ? 0 : operand_.packing()->row_bytes(operand_.sizes.k);
  }

  Operand operand_;
  Scratch<int32_t> row_sums_;
  Scratch<int8_t> packed_;
};

void fill_residual(
    const Activation& x, const int8_t* codes, const float* row_scale, float from, int64_t count, const int32_t* columns,
    float* residual) {
  at::parallel_for(0, x.rows, divide_up(kQuantizeGrain, 4 * count), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      kernels().residual_row(
          element(x.data, x.type, m * x.k), x.type, codes + m * x.k, row_scale[m], from, count, columns,
          residual + m * count);
    }
  });
}

// Columns a tile has. For one row nothing is used twice but what the outlier columns gather: stay in L1 or L2 for that.
int64_t tile_cols(int64_t rows, int64_t k) {
  if (rows > 4) {
    return kTileCols;
  }
  return std::clamp<int64_t>(65536 / std::max<int64_t>(k, 1) / kStrip * kStrip, kStrip, kTileCols);
}

struct Range {
  int64_t begin, end;
};

// Part `index` of [0, size) in `parts` even parts, cut at multiples of `unit`.
Range part(int64_t size, int64_t unit, int64_t parts, int64_t index) {
  const int64_t units = divide_up(size, unit);
  return {
      std::min(size, units * index / parts * unit),
      std::min(size, units * (index + 1) / parts * unit),
  };
}

// The thread's CPU as the provider wants it, for a scope.
class Prepared {
 public:
  explicit Prepared(const Packing* packing) : packing_(packing) {
    if (packing_ != nullptr) {
      packing_->begin();
    }
  }

  ~Prepared() {
    if (packing_ != nullptr) {
      packing_->end();
    }
  }

  Prepared(const Prepared&) = delete;
  Prepared& operator=(const Prepared&) = delete;

 private:
  const Packing* packing_;
};

// The high bytes of 16-bit codes, and the weight in their columns, or null: then each tile gathers it from the weight.
struct High {
  Operand left;
  const int32_t* columns;
  Codes weight;
};

Codes from_col(Codes weight, int64_t col) {
  return {weight.data + col * weight.stride, weight.stride};
}

// The weight of some columns of the output in `count` columns of its own, to [cols, count].
void gather_columns(Codes weight, int64_t cols, const int32_t* columns, int64_t count, int8_t* to) {
  for (int64_t n = 0; n < cols; ++n, to += count) {
    const int8_t* from = weight.data + n * weight.stride;
    for (int64_t t = 0; t < count; ++t) {
      to[t] = from[columns[t]];
    }
  }
}

void multiply_part(
    Range rows, Range cols, int64_t k, const Operand& left, const High* high, const float* row_scale,
    const Outliers& outliers, const Product& p) {
  alignas(64) static thread_local int32_t sums[kTileRows * kTileCols], high_sums[kTileRows * kTileCols];
  const Prepared prepared(left.packing() == nullptr && high != nullptr ? high->left.packing() : left.packing());
  Scratch<float> gathered(outliers.count * kTileCols);
  const bool gathers = high != nullptr && high->weight.data == nullptr;
  Scratch<int8_t> high_weight(gathers ? high->left.sizes.k * kTileCols : 0);
  const int64_t col_step = tile_cols(rows.end - rows.begin, k);
  for (int64_t row = rows.begin; row < rows.end; row += kTileRows) {
    const Codes codes = left.codes.from_row(row);
    const Multiplier& multiplier = left.of_rows(std::min(kTileRows, rows.end - row));
    for (int64_t col = cols.begin; col < cols.end; col += col_step) {
      Tile tile;
      tile.rows = std::min(kTileRows, rows.end - row);
      tile.cols = std::min(col_step, cols.end - col);
      tile.sums = sums;
      tile.row_scale = row_scale + row;
      tile.weight = from_col(p.weight, col);
      tile.weight_scale = p.weight_scale + col;
      tile.bias = p.bias == nullptr ? nullptr : element(p.bias, p.bias_type, col);
      tile.bias_type = p.bias_type;
      tile.outliers = outliers;
      tile.outliers.residual += row * outliers.count;
      tile.gathered = gathered.data();
      tile.out_stride = p.out_stride == 0 ? p.cols : p.out_stride;
      tile.out = const_cast<char*>(element(p.out, p.out_type, row * tile.out_stride + col));
      tile.out_type = p.out_type;
      multiplier.multiply(codes, tile.weight, tile.rows, tile.cols, k, sums);
      if (high != nullptr) {
        const Operand& bytes = high->left;
        Codes weight = {high_weight.data(), bytes.sizes.k};
        if (gathers) {  // while the tile's weight is in a cache
          gather_columns(tile.weight, tile.cols, high->columns, bytes.sizes.k, high_weight.data());
        } else {
          weight = from_col(high->weight, col);
        }
        bytes.multiplier->multiply(
            bytes.codes.from_row(row), weight, tile.rows, tile.cols, bytes.sizes.k, high_sums);
        tile.high_sums = high_sums;
      }
      left.use->finish(tile);
    }
  }
}

// How the high bytes are multiplied, of which a row has few: dot would spend its time on horizontal sums.
Method method_for_few(const Kernels& use, const Sizes& few, Method of_all) {
  if (few.rows >= kPanelFromRows && use.multipliers.can(Method::panel, few.k)) {
    return Method::panel;
  }
  return use.multipliers.can(of_all, few.k) ? of_all : use.method(few);
}

// The whole product, split among threads.
void multiply(
    const Operand& left, const High* high, const float* row_scale, const Outliers& outliers, const Product& product) {
  const Sizes& sizes = left.sizes;
  const int64_t work = sizes.rows * sizes.cols * std::max<int64_t>(sizes.k, 1);
  const int64_t threads = at::in_parallel_region() ? 1 : sizes.threads;
  const int64_t parts = std::clamp<int64_t>(work / kProductGrain, 1, threads);
  const int64_t col_parts = std::min(parts, divide_up(sizes.cols, kStrip));
  const int64_t row_parts = std::min(parts / col_parts, divide_up(sizes.rows, 8));
  const bool packed = left.packing() != nullptr || (high != nullptr && high->left.packing() != nullptr);
  at::parallel_for(0, row_parts * col_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Range rows = part(sizes.rows, packed ? kPackRows : 1, row_parts, i / col_parts);
      const Range cols = part(sizes.cols, kStrip, col_parts, i % col_parts);
      multiply_part(rows, cols, sizes.k, left, high, row_scale, outliers, product);
    }
  });
}

// codes [rows, k], the high bytes [rows, columns.count] of those in the columns, and scale [rows].
void quantize_calibrated_rows(
    const Activation& x, const Columns& columns, int8_t* codes, int8_t* high, float* scale) {
  Scratch<uint8_t> flags(x.k / 8 + 5);
  std::memset(flags.data(), 0, x.k / 8 + 5);
  for (int64_t t = 0; t < columns.count; ++t) {
    flags.data()[columns.at[t] / 8] |= uint8_t(1 << columns.at[t] % 8);
  }
  const WideColumns wide = {columns.count, columns.at, flags.data()};
  at::parallel_for(0, x.rows, divide_up(kQuantizeGrain, std::max<int64_t>(x.k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      scale[m] = kernels().quantize_calibrated_row(
          element(x.data, x.type, m * x.k), x.type, x.k, wide, codes + m * x.k, high + m * columns.count);
    }
  });
}

}  // namespace

void quantize_rows(const Activation& x, float threshold, int8_t* codes, float* scale, uint8_t* outliers) {
  if (outliers != nullptr) {
    std::memset(outliers, 0, x.k);
  }
  at::parallel_for(0, x.rows, divide_up(kQuantizeGrain, std::max<int64_t>(x.k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      scale[m] = kernels().quantize_row(
          element(x.data, x.type, m * x.k), x.type, x.k, threshold, codes + m * x.k, outliers);
    }
  });
}

void scaled_product(
    const Activation& x, const int8_t* codes, const float* row_scale, const uint8_t* flags, float residual_from,
    const Product& product) {
  if (x.rows == 0 || product.cols == 0) {
    return;
  }
  Outliers outliers;
  Scratch<int32_t> columns(flags == nullptr ? 0 : x.k);
  if (flags != nullptr) {
    outliers.count = list_columns(flags, x.k, columns.data());
    outliers.columns = columns.data();
  }
  Scratch<float> residual(x.rows * outliers.count);
  if (outliers.count > 0) {
    fill_residual(x, codes, row_scale, residual_from, outliers.count, columns.data(), residual.data());
    outliers.residual = residual.data();
  }
  const Kernels& use = kernels();
  const Sizes sizes = {x.rows, product.cols, x.k, at::get_num_threads()};
  Arranged left(use, sizes, use.multipliers[plan(use, sizes)], codes);
  multiply(*left, nullptr, row_scale, outliers, product);
}

void calibrated_linear(const Activation& x, const Columns& columns, const Product& product) {
  if (x.rows == 0 || product.cols == 0) {
    return;
  }
  const Kernels& use = kernels();
  Scratch<int8_t> codes(x.rows * x.k), high(x.rows * columns.count);
  Scratch<float> row_scale(x.rows);
  quantize_calibrated_rows(x, columns, codes.data(), high.data(), row_scale.data());
  const Sizes sizes = {x.rows, product.cols, x.k, at::get_num_threads()};
  const Method method = plan(use, sizes);
  Arranged left(use, sizes, use.multipliers[method], codes.data());
  const Sizes few = {x.rows, product.cols, columns.count, sizes.threads};
  Arranged bytes(use, few, use.multipliers[method_for_few(use, few, method)], high.data());
  const High both = {*bytes, columns.at, columns.weight};
  multiply(*left, columns.count == 0 ? nullptr : &both, row_scale.data(), {}, product);
}

void quantized_linear(
    const Activation& x, bool outliers, float threshold, float residual_from, const Product& product) {
  Scratch<int8_t> codes(x.rows * x.k);
  Scratch<float> row_scale(x.rows);
  Scratch<uint8_t> flags(outliers ? x.k : 0);
  uint8_t* found = outliers ? flags.data() : nullptr;
  quantize_rows(x, threshold, codes.data(), row_scale.data(), found);
  scaled_product(x, codes.data(), row_scale.data(), found, residual_from, product);
}

}  // namespace int8compile
