// An activation is quantised once, row by row, and its outlier columns are found group by group: what an expert computes
// depends on its own rows alone. Then each thread takes an even share of all the work, which is a run of columns of
// some experts, and multiplies it as a product of its own. No number depends on the shares.

#include "grouped.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "scratch.h"
#include "weight_only.h"

namespace int8compile {
namespace {

constexpr int64_t kQuantizeGrain = 32768;  // elements worth a thread
constexpr int64_t kProductGrain = 131072;  // multiplications worth a thread

// What it costs to read a weight from memory, in rows that could be multiplied meanwhile. Measured nowhere: shares of
// experts with many rows and with one should merely be of the same order.
constexpr int64_t kReadingRows = 16;

// `flags` [groups, k] is null or takes each group's outlier columns.
void quantize_groups(
    const Activation& x, const std::vector<Group>& groups, float threshold, int8_t* codes, float* scale,
    uint8_t* flags) {
  if (flags != nullptr) {
    std::memset(flags, 0, groups.size() * x.k);
  }
  const int64_t grain = divide_up(kQuantizeGrain, std::max<int64_t>(x.k, 1));
  at::parallel_for(0, groups.back().end, grain, [&](int64_t begin, int64_t end) {
    size_t group = 0;
    for (int64_t m = begin; m < end; ++m) {
      while (m >= groups[group].end) {
        ++group;
      }
      scale[m] = kernels().quantize_row(
          element(x.data, x.type, m * x.k), x.type, x.k, threshold, codes + m * x.k,
          flags == nullptr ? nullptr : flags + group * x.k);
    }
  });
}

// What columns [begin, end) of a group's product are made of.
Product product_of(const Group& group, int64_t begin, int64_t end, Float type, const Experts& experts) {
  const int64_t column = group.expert * experts.cols + begin;
  Product product;
  product.cols = end - begin;
  product.weight = {
      experts.weight + group.expert * experts.expert_stride + begin * experts.row_stride, experts.row_stride};
  product.weight_scale = experts.weight_scale + column;
  product.bias = experts.bias == nullptr ? nullptr : element(experts.bias, experts.bias_type, column);
  product.bias_type = experts.bias_type;
  product.out = const_cast<char*>(element(experts.out, type, group.begin * experts.cols + begin));
  product.out_type = type;
  product.out_stride = experts.cols;
  return product;
}

// Calls multiply(group's index, its rows, product) for all columns of all groups, an even share in each thread.
template <class Multiply>
void share(
    const Activation& x, const std::vector<Group>& groups, const Experts& experts, const Multiply& multiply) {
  // Work is counted in strips of columns, whose cost is the same within a group.
  const int64_t rows = groups.back().end, strips = divide_up(experts.cols, kStrip);
  const int64_t total = strips * (rows + kReadingRows * int64_t(groups.size()));
  const int64_t parts = std::clamp<int64_t>(
      rows * experts.cols * std::max<int64_t>(x.k, 1) / kProductGrain, 1, at::get_num_threads());
  const auto multiply_part = [&](int64_t first, int64_t last) {  // costs [first, last) of the total
    int64_t before = 0;
    for (size_t i = 0; i < groups.size() && before < last; ++i) {
      const Group& group = groups[i];
      const int64_t cost = group.end - group.begin + kReadingRows;
      const auto columns_up_to = [&](int64_t spent) {
        return std::min(experts.cols, std::clamp<int64_t>(divide_up(spent - before, cost), 0, strips) * kStrip);
      };
      const int64_t begin = columns_up_to(first), end = columns_up_to(last);
      if (begin < end) {
        const Activation own = {element(x.data, x.type, group.begin * x.k), x.type, group.end - group.begin, x.k};
        multiply(i, own, product_of(group, begin, end, x.type, experts));
      }
      before += cost * strips;
    }
  };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    multiply_part(total * begin / parts, total * end / parts);
  });
}

}  // namespace

std::vector<Group> groups_of(const int32_t* offsets, int64_t experts, int64_t rows) {
  std::vector<Group> groups;
  int64_t begin = 0;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t end = std::min<int64_t>(offsets[expert], rows);  // read once: another thread may be writing it
    if (end > begin) {
      groups.push_back({expert, begin, end});
      begin = end;
    }
  }
  return groups;
}

void quantized_groups(
    const Activation& x, const std::vector<Group>& groups, bool outliers, float threshold, float residual_from,
    const Experts& experts) {
  if (groups.empty() || experts.cols == 0) {
    return;
  }
  const int64_t rows = groups.back().end;
  Scratch<int8_t> codes(rows * x.k);
  Scratch<float> scale(rows);
  Scratch<uint8_t> flags(outliers ? int64_t(groups.size()) * x.k : 0);
  uint8_t* const found = outliers ? flags.data() : nullptr;
  quantize_groups(x, groups, threshold, codes.data(), scale.data(), found);
  share(x, groups, experts, [&](size_t group, const Activation& own, const Product& product) {
    const int64_t begin = groups[group].begin;
    scaled_product(
        own, codes.data() + begin * x.k, scale.data() + begin, found == nullptr ? nullptr : found + group * x.k,
        residual_from, product);
  });
}

void weight_only_groups(const Activation& x, const std::vector<Group>& groups, const Experts& experts) {
  if (groups.empty() || experts.cols == 0) {
    return;
  }
  share(x, groups, experts, [](size_t, const Activation& own, const Product& product) {
    weight_only_linear(own, product);
  });
}

}  // namespace int8compile
