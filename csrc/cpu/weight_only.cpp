// Threads, tiles and scratch memory; the arithmetic is float_product.h's.
//
// The activation is widened to fp32 once a call, a copy of four bytes an element, unless it is fp32 already. Then the
// columns are split among threads, so that each weight is read by one, or the rows where there are too few columns.

#include "weight_only.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "scratch.h"

namespace int8compile {
namespace {

constexpr int64_t kWidenGrain = 65536;  // elements worth a thread
constexpr int64_t kProductGrain = 65536;  // multiplications worth a thread

// Rows of floats, each a multiple of kFloatStep long with zeros at its end: x itself, or a copy.
class FloatRows {
 public:
  FloatRows(const Kernels& use, const Activation& x)
      : as_they_are_(x.type == Float::f32 && x.k % kFloatStep == 0), stride_(stride_of(x)),
        memory_(as_they_are_ ? 0 : x.rows * stride_) {
    if (as_they_are_) {
      data_ = static_cast<const float*>(x.data);
      return;
    }
    float* to = memory_.data();
    at::parallel_for(0, x.rows, divide_up(kWidenGrain, stride_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        use.widen_row(element(x.data, x.type, row * x.k), x.type, x.k, to + row * stride_);
      }
    });
    data_ = to;
  }

  const float* row(int64_t at) const {
    return data_ + at * stride_;
  }

  int64_t stride() const {
    return stride_;
  }

 private:
  // (Rows of a copy at multiples of a page would share the same lines of a cache.)
  int64_t stride_of(const Activation& x) const {
    return as_they_are_ ? x.k : (divide_up(x.k, kFloatStep) + 1) * kFloatStep;
  }

  bool as_they_are_;
  int64_t stride_;
  Scratch<float> memory_;
  const float* data_;
};

struct Range {
  int64_t begin, end;
};

void multiply_part(
    const Kernels& use, const FloatRows& x, Range rows, Range cols, int64_t k, const Product& p) {
  alignas(64) static thread_local float scratch[kFloatScratch];
  for (int64_t col = cols.begin; col < cols.end; col += kTileCols) {
    for (int64_t row = rows.begin; row < rows.end; row += kFloatRows) {
      FloatTile tile;
      tile.rows = std::min(kFloatRows, rows.end - row);
      tile.cols = std::min(kTileCols, cols.end - col);
      tile.k = k;
      tile.x = x.row(row);
      tile.x_stride = x.stride();
      tile.weight = {p.weight.data + col * p.weight.stride, p.weight.stride};
      tile.weight_scale = p.weight_scale + col;
      tile.bias = p.bias == nullptr ? nullptr : element(p.bias, p.bias_type, col);
      tile.bias_type = p.bias_type;
      tile.scratch = scratch;
      tile.out_stride = p.out_stride == 0 ? p.cols : p.out_stride;
      tile.out = const_cast<char*>(element(p.out, p.out_type, row * tile.out_stride + col));
      tile.out_type = p.out_type;
      use.float_product(tile);
    }
  }
}

}  // namespace

void weight_only_linear(const Activation& x, const Product& product) {
  if (x.rows == 0 || product.cols == 0) {
    return;
  }
  const Kernels& use = kernels();
  const FloatRows floats(use, x);
  const int64_t work = x.rows * product.cols * std::max<int64_t>(x.k, 1);
  const int64_t strips = divide_up(product.cols, kStrip);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = std::clamp<int64_t>(work / kProductGrain, 1, threads);
  const int64_t col_parts = std::min(parts, strips);
  const int64_t row_parts = std::min(parts / col_parts, divide_up(x.rows, 8));
  at::parallel_for(0, row_parts * col_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t down = i / col_parts, across = i % col_parts;
      const Range rows = {x.rows * down / row_parts, x.rows * (down + 1) / row_parts};
      const Range cols = {
          strips * across / col_parts * kStrip, std::min(product.cols, strips * (across + 1) / col_parts * kStrip)};
      multiply_part(use, floats, rows, cols, x.k, product);
    }
  });
}

}  // namespace int8compile
