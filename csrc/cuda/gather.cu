// The operands of the outlier product, gathered once: residuals [M, capacity] and weights [N, capacity], padded with
// zeros to a multiple of 16 columns. Each block lists the columns for itself from the flags, which is a few kilobytes
// out of L2, and then takes its share of rows; without outliers it is done at once.

#include "launch.cuh"
#include "outliers.cuh"

namespace int8compile {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    gather(Activation x, Quantized q, Product p, float residual_from, Gathered out) {
  start_next_kernel();
  wait_for_previous_kernel();
  auto* columns = reinterpret_cast<int32_t*>(dynamic_shared());
  int* scratch = columns + kGatherCapacity;
  const int thread = threadIdx.x;
  const Group block{thread, kThreads, 0};
  const int count = list_columns(block, q.flags, x.k, 0, kGatherCapacity, columns, scratch);
  if (blockIdx.x == 0 && thread == 0) {
    *out.count = count;
  }
  const int here = count < kGatherCapacity ? count : kGatherCapacity;
  const int padded = (here + 15) / 16 * 16;
  // Sixteen threads take a row: of x first, then of the weight.
  const int64_t lines = x.rows + p.cols, step = int64_t(gridDim.x) * (kThreads / 16);
  for (int64_t line = int64_t(blockIdx.x) * (kThreads / 16) + thread / 16; line < lines && here > 0; line += step) {
    for (int t = thread % 16; t < padded; t += 16) {
      const int64_t column = t < here ? columns[t] : 0;
      if (line < x.rows) {
        float value = 0.0f;
        if (t < here) {
          const int64_t at = line * x.k + column;
          value = residual_of(load_float(x.data, x.type, at), q.row_scale[line], q.codes[at], residual_from);
        }
        store_float(out.residual, x.type, line * out.capacity + t, value);
      } else {
        const int64_t col = line - x.rows;
        out.weight[col * out.capacity + t] = t < here ? p.weight[col * p.weight_stride + column] : int8_t(0);
      }
    }
  }
}

}  // namespace

cudaError_t launch_gather(
    const Activation& x, const Quantized& q, const Product& p, float residual_from, const Gathered& out, bool overlap,
    cudaStream_t stream) {
  const int64_t wanted = divide_up(x.rows + p.cols, kThreads / 16), most = 8 * int64_t(current_gpu().multiprocessors);
  return launch(
      gather, wanted < most ? wanted : most, kThreads, (kGatherCapacity + kListScratch) * 4, overlap, stream, x, q, p,
      residual_from, out);
}

}  // namespace int8compile
