// Whole calls: quantise, pack, multiply in parts on several threads, finish.

#include <cstring>
#include <limits>
#include <vector>

#include "../../../csrc/cpu/plan.h"
#include "../../../csrc/cpu/product.h"
#include "../../../csrc/cpu/weight_only.h"
#include "ATen/Parallel.h"
#include "check.h"

using namespace int8compile;

namespace {

struct Problem {
  int64_t rows, cols, k;
  Float type, out_type;
  float threshold, residual_from;
  Exact<char> x;
  Exact<int8_t> weight;
  Exact<float> scale;
  Exact<char> bias;

  Problem(Random& random, int64_t m, int64_t n, int64_t depth)
      : Problem(random, m, n, depth, random.one_of({0.0f, 6.0f, 12.0f}), {}) {
    residual_from = random.one_of({0.0f, threshold});
  }

  Problem(Random& random, int64_t m, int64_t n, int64_t depth, float at_least, const std::vector<float>& odd)
      : rows(m), cols(n), k(depth), type(Float(random.below(3))), out_type(Float(random.below(3))),
        threshold(at_least), residual_from(at_least), x(floats(random, type, m * depth, odd)), weight(n * depth),
        scale(n), bias(floats(random, out_type, n, {})) {
    for (int8_t& code : weight) {
      code = int8_t(random.below(255) - 127);
    }
    for (float& value : scale) {
      value = float(1 + random.below(100)) * 0x1p-12f;
    }
  }

  Exact<char> run(int threads, bool weight_only = false) const {
    at::threads() = threads;
    Exact<char> out(rows * cols * bytes_of(out_type));
    std::memset(out.data(), 0x22, out.size());
    Product product = {cols, {weight.data(), k}, scale.data(), bias.data(), out_type, out.data(), out_type};
    if (weight_only) {
      weight_only_linear({x.data(), type, rows, k}, product);
      return out;
    }
    quantized_linear({x.data(), type, rows, k}, threshold != 0, threshold, residual_from, product);
    expect(tiles_are_released(), "the tiles are not released");
    return out;
  }
};

bool same(const Exact<char>& a, const Exact<char>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size()) == 0;
}

// Nothing, next to nothing and the ends of vectors and tiles, at thresholds that operators take and that they refuse.
std::vector<Problem> extremes(Random& random) {
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), inf = std::numeric_limits<float>::infinity();
  const int64_t shapes[][3] = {
      {0, 5, 7}, {3, 0, 7}, {3, 5, 0}, {0, 0, 0}, {1, 1, 1}, {2, 1, 1}, {1, 1, 17}, {5, 1, 15}, {7, 17, 33},
      {5, 97, 70},
  };
  std::vector<Problem> made;
  for (const auto& shape : shapes) {
    for (const float threshold : {1e-45f, 0x1p-126f, 0.5f, 3e38f, inf, -1.0f, nan}) {
      made.emplace_back(random, shape[0], shape[1], shape[2], threshold, std::vector<float>{0.0f, 1e-45f, inf, nan});
    }
  }
  return made;
}

// Who multiplies: what the table says, and each of the provider's methods.
std::vector<std::string> choices(const Kernels& use, int64_t k) {
  std::vector<std::string> names = {"auto"};
  for (int method = 0; method < kMethods; ++method) {
    if (use.multipliers.can(Method(method), k)) {
      names.push_back(name_of(Method(method)));
    }
  }
  return names;
}

}  // namespace

void check_product(const Kernels** use) {
  const Kernels* checked = *use;
  // The same sums and the portable epilogue: the outlier product of others rounds differently.
  Kernels reference = *portable_kernels();
  reference.finish = checked->finish;
  Random random;
  const int64_t shapes[][3] = {
      {1, 40, 100}, {4, 100, 64}, {5, 7, 65}, {6, 130, 63}, {9, 100, 300}, {16, 48, 1}, {17, 33, 705}, {40, 20, 130},
      {100, 5, 200}, {193, 17, 64}, {210, 100, 70}, {400, 16, 129},
      {131, 69, 531},
  };
  std::vector<Problem> problems = extremes(random);
  for (const auto& shape : shapes) {
    for (int i = 0; i < 2; ++i) {
      problems.emplace_back(random, shape[0], shape[1], shape[2]);
    }
  }
  for (const Problem& problem : problems) {
    *use = &reference;
    const Exact<char> want = problem.run(1);
    *use = checked;
    for (const std::string& method : choices(*checked, problem.k)) {
      force_method(method);
      for (const int threads : {1, 3, 8}) {
        expect(
            same(problem.run(threads), want), "product ", problem.rows, " x ", problem.k, " x ", problem.cols, " by ",
            method, ", threshold ", problem.threshold, ", ", threads, " threads: outputs differ");
      }
    }
    force_method("auto");
    const Exact<char> once = problem.run(1, true);
    for (const int threads : {3, 8}) {
      expect(
          same(problem.run(threads, true), once), "weights only ", problem.rows, " x ", problem.k, " x ", problem.cols,
          ", ", threads, " threads: outputs differ");
    }
  }
}
