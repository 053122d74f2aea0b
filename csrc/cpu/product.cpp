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

  const Packing* packing() const {
    return multiplier->packing;
  }

  // For a tile of some of the rows. They may be too few for the method of all of them, unless they are packed for it.
  const Multiplier& of_rows(int64_t rows) const {
    if (rows == sizes.rows || packing() != nullptr) {
      return *multiplier;
    }
    const Multiplier& own = use->multipliers[plan(*use, {rows, sizes.cols, sizes.k, sizes.threads})];
    return own.packing == nullptr ? own : *multiplier;
  }
};

void pack(const Packing& packing, const Activation& x, const int8_t* codes, int64_t row_bytes, int8_t* packed) {
  const int64_t grain = divide_up(kPackGrain, kPackRows * x.k);
  at::parallel_for(0, divide_up(x.rows, kPackRows), grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * kPackRows; row < std::min(x.rows, end * kPackRows); row += kPackRows) {
      packing.pack({codes + row * x.k, x.k}, std::min(kPackRows, x.rows - row), x.k, packed + row * row_bytes);
    }
  });
}

void fill_row_sums(const Kernels& use, const Activation& x, const int8_t* codes, int32_t* sums) {
  at::parallel_for(0, x.rows, divide_up(kPackGrain, std::max<int64_t>(x.k, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      sums[m] = use.row_sum(codes + m * x.k, x.k);
    }
  });
}

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

void multiply_part(
    Range rows, Range cols, int64_t k, const Operand& left, const float* row_scale, const Outliers& outliers,
    const Product& p) {
  alignas(64) static thread_local int32_t sums[kTileRows * kTileCols];
  const Prepared prepared(left.packing());
  Scratch<float> gathered(outliers.count * kTileCols);
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
      tile.weight = {p.weight.data + col * p.weight.stride, p.weight.stride};
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
      left.use->finish(tile);
    }
  }
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
  Operand left = {&use, sizes, &use.multipliers[plan(use, sizes)], {codes, x.k}};
  const Packing* packing = left.packing();
  const bool sums = packing == nullptr && use.row_sum != nullptr;
  Scratch<int32_t> row_sums(sums ? x.rows : 0);
  if (sums) {
    fill_row_sums(use, x, codes, row_sums.data());
    left.codes.row_sums = row_sums.data();
  }
  const int64_t row_bytes = packing == nullptr ? 0 : packing->row_bytes(x.k);
  Scratch<int8_t> packed(divide_up(x.rows, kPackRows) * kPackRows * row_bytes);
  if (packing != nullptr) {
    pack(*packing, x, codes, row_bytes, packed.data());
    left.codes = {packed.data(), row_bytes};
  }
  const int64_t work = x.rows * product.cols * std::max<int64_t>(x.k, 1);
  const int64_t threads = at::in_parallel_region() ? 1 : sizes.threads;
  const int64_t parts = std::clamp<int64_t>(work / kProductGrain, 1, threads);
  const int64_t col_parts = std::min(parts, divide_up(product.cols, kStrip));
  const int64_t row_parts = std::min(parts / col_parts, divide_up(x.rows, 8));
  at::parallel_for(0, row_parts * col_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Range rows = part(x.rows, packing == nullptr ? 1 : kPackRows, row_parts, i / col_parts);
      const Range cols = part(product.cols, kStrip, col_parts, i % col_parts);
      multiply_part(rows, cols, x.k, left, row_scale, outliers, product);
    }
  });
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
