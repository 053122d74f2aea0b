// The launches of one operator call, in stream order:
//
//   linear      zero (flags, tickets) -> quantize -> gather, if there are many rows -> product
//               or the fused product alone
//   scaled_mm   zero (tickets), if K is shared between blocks -> gather, if there are many rows -> product
//
// The first launch of a call waits for all that is on the stream; each later one may overlap with the launch before it.

#include "run.h"

#include <algorithm>

namespace int8compile {
namespace {

// Cuts one piece of memory up. Over a null pointer it only measures.
class Scratch {
 public:
  explicit Scratch(void* memory) : base_(static_cast<char*>(memory)) {}

  template <class T>
  T* take(int64_t count) {
    T* taken = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (count * int64_t(sizeof(T)) + 255) / 256 * 256;
    return taken;
  }

  int64_t used() const {
    return used_;
  }

 private:
  char* base_;
  int64_t used_ = 0;
};

bool is_aligned(const Problem& problem, const void* codes) {
  const Product& p = problem.p;
  return aligned(codes, problem.x.k, problem.x.k) && aligned(p.weight, p.weight_stride, problem.x.k) &&
         p.weight_stride >= problem.x.k;
}

Plan plan_of(const Problem& problem, const void* codes, bool can_fuse, const Gpu& gpu) {
  const bool x_aligned = reinterpret_cast<uintptr_t>(problem.x.data) % 16 == 0;
  const Sizes sizes{
      problem.x.rows, problem.p.cols, problem.x.k, is_aligned(problem, codes), can_fuse && x_aligned};
  return plan(sizes, gpu, problem.choice);
}

// The scratch memory of a call. `zeroed` bytes from `zero` on hold flags and tickets, side by side.
struct Areas {
  void* zero = nullptr;
  int64_t zeroed = 0;
  Quantized q{};
  Gathered gathered{};
  SplitK split{1, nullptr, nullptr};

  Areas(Scratch& scratch, const Problem& problem, const Plan& plan, bool quantizes, bool has_flags) {
    const Activation& x = problem.x;
    const int64_t before = scratch.used();
    zero = scratch.take<char>(0);
    if (quantizes && has_flags) {
      q.flags = scratch.take<uint8_t>(x.k);
    }
    if (plan.splits > 1) {
      const TileShape shape = shape_of(plan.tile);
      const int64_t tiles = (x.rows + shape.rows - 1) / shape.rows * ((problem.p.cols + shape.cols - 1) / shape.cols);
      split = {plan.splits, nullptr, scratch.take<unsigned>(tiles)};
      zeroed = scratch.used() - before;
      split.partial = scratch.take<int32_t>(tiles * plan.splits * shape.rows * shape.cols);
    }
    zeroed = zeroed > 0 ? zeroed : scratch.used() - before;
    if (quantizes) {
      q.codes = scratch.take<int8_t>(x.rows * x.k);
      q.row_scale = scratch.take<float>(x.rows);
    }
    if (plan.gather && has_flags) {
      gathered.capacity = kGatherCapacity;
      gathered.count = scratch.take<int>(1);
      gathered.residual = scratch.take<char>(x.rows * kGatherCapacity * size_of(x.type));
      gathered.weight = scratch.take<int8_t>(problem.p.cols * kGatherCapacity);
    }
  }
};

cudaError_t launch_product(
    const Problem& problem, const Plan& plan, const Quantized& q, const Areas& areas, bool overlap,
    cudaStream_t stream) {
  const float from = problem.thresholds.residual_from;
  if (areas.gathered.capacity > 0) {
    const cudaError_t error = launch_gather(problem.x, q, problem.p, from, areas.gathered, overlap, stream);
    if (error != cudaSuccess) {
      return error;
    }
    overlap = true;
  }
  switch (plan.kernel) {
    case Kernel::fused:
    case Kernel::skinny:
      return launch_skinny(
          problem.x, q, problem.p, problem.thresholds, plan.kernel == Kernel::fused, overlap, stream);
    case Kernel::tile:
      return launch_gemm(plan.tile, problem.x, q, problem.p, from, areas.gathered, areas.split, overlap, stream);
    default:
      return launch_wgmma(
          plan.kernel == Kernel::wgmma256 ? 256 : 128, problem.x, q, problem.p, from, areas.gathered, overlap, stream);
  }
}

Plan linear_plan(const Problem& problem, const Gpu& gpu) {
  return plan_of(problem, nullptr, true, gpu);  // codes of our own are aligned as well as null is
}

bool looks_for_outliers(const Problem& problem) {
  return problem.thresholds.outlier > 0;
}

bool is_empty(const Problem& problem) {
  return problem.x.rows == 0 || problem.p.cols == 0;
}

}  // namespace

int64_t linear_scratch(const Problem& problem, const Gpu& gpu) {
  if (is_empty(problem)) {
    return 0;
  }
  const Plan plan = linear_plan(problem, gpu);
  Scratch scratch(nullptr);
  Areas(scratch, problem, plan, plan.kernel != Kernel::fused, looks_for_outliers(problem));
  return scratch.used();
}

cudaError_t run_linear(const Problem& problem, const Gpu& gpu, void* memory, cudaStream_t stream) {
  if (is_empty(problem)) {
    return cudaSuccess;
  }
  const Plan plan = linear_plan(problem, gpu);
  Scratch scratch(memory);
  const bool fused = plan.kernel == Kernel::fused;
  const Areas areas(scratch, problem, plan, !fused, looks_for_outliers(problem));
  if (areas.zeroed > 0) {
    const cudaError_t error = launch_zero(areas.zero, areas.zeroed, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  if (!fused) {
    const cudaError_t error =
        launch_quantize(problem.x, problem.thresholds.outlier, areas.q, areas.zeroed > 0, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_product(problem, plan, areas.q, areas, !fused, stream);
}

int64_t product_scratch(const Problem& problem, const Quantized& q, const Gpu& gpu) {
  if (is_empty(problem)) {
    return 0;
  }
  Scratch scratch(nullptr);
  Areas(scratch, problem, plan_of(problem, q.codes, false, gpu), false, q.flags != nullptr);
  return scratch.used();
}

cudaError_t run_product(
    const Problem& problem, const Quantized& q, const Gpu& gpu, void* memory, cudaStream_t stream) {
  if (is_empty(problem)) {
    return cudaSuccess;
  }
  const Plan plan = plan_of(problem, q.codes, false, gpu);
  Scratch scratch(memory);
  const Areas areas(scratch, problem, plan, false, q.flags != nullptr);
  if (areas.zeroed > 0) {
    const cudaError_t error = launch_zero(areas.zero, areas.zeroed, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_product(problem, plan, q, areas, areas.zeroed > 0, stream);
}

cudaError_t run_quantize(const Activation& x, float threshold, const Quantized& q, cudaStream_t stream) {
  if (q.flags != nullptr && x.k > 0) {
    const cudaError_t error = launch_zero(q.flags, x.k, stream);
    if (error != cudaSuccess) {
      return error;
    }
  }
  return launch_quantize(x, threshold, q, q.flags != nullptr && x.k > 0, stream);
}

}  // namespace int8compile
