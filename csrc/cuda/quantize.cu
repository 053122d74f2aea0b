// quantize_rowwise on a GPU: one block a row. The row is read once from memory: what a thread does not keep in
// registers it finds in L1 when it comes back with the scale.
//
// Outlier columns are bytes set to 1 by whichever rows meet one. They must be 0 before, which is launch_zero()'s work:
// a kernel so small that it is over before the rows' maxima are known.

#include "launch.cuh"
#include "quantize.cuh"

namespace int8compile {
namespace {

constexpr int kHeld = 4;  // packs a thread keeps

__global__ void zero(uint32_t* words, int64_t bytes) {
  start_next_kernel();
  const int64_t first = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  for (int64_t i = first; i < bytes / 4; i += int64_t(gridDim.x) * blockDim.x) {
    words[i] = 0;
  }
  if (first < bytes % 4) {
    reinterpret_cast<uint8_t*>(words)[bytes / 4 * 4 + first] = 0;
  }
}

// Shared memory: a word for each warp. `packs`: how many 16-byte packs of the row are read as such; the rest, and all
// of a row that is not aligned, is read an element at a time.
template <class X>
__global__ void __launch_bounds__(1024) quantize_rows(
    const X* x, int64_t k, int64_t packs, float threshold, int8_t* codes, float* row_scale, uint8_t* flags) {
  start_next_kernel();
  int* warp_most = reinterpret_cast<int*>(dynamic_shared());
  const int64_t row = blockIdx.x;
  const int thread = threadIdx.x, threads = blockDim.x;
  const X* from = x + row * k;
  const auto* from_packs = reinterpret_cast<const Pack<X>*>(from);
  int8_t* to = codes + row * k;
  constexpr int size = Pack<X>::size;

  Pack<X> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * threads < packs) {
      held[i] = from_packs[thread + i * threads];
    }
  }
  wait_for_previous_kernel();  // flags are zero from here on

  const auto flag = [&](int64_t column) {
    if (flags[column] == 0) {  // spares most of the stores of a column that is an outlier in many rows
      flags[column] = 1;
    }
  };
  int most = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * threads < packs) {
      most = larger(most, held[i], threshold, int64_t(thread + i * threads) * size, flag);
    }
  }
  for (int64_t at = thread + kHeld * threads; at < packs; at += threads) {
    most = larger(most, from_packs[at], threshold, at * size, flag);
  }
  for (int64_t at = packs * size + thread; at < k; at += threads) {
    most = larger(most, to_float(from[at]), threshold, at, flag);
  }

  most = warp_max(most);
  if (thread % 32 == 0) {
    warp_most[thread / 32] = most;
  }
  __syncthreads();
  for (int warp = 0; warp < threads / 32; ++warp) {
    most = warp_most[warp] > most ? warp_most[warp] : most;
  }
  const RowCode coded(most);
  if (thread == 0) {
    row_scale[row] = coded.scale;
  }

#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * threads < packs) {
      store_codes(held[i], coded, threshold, to + int64_t(thread + i * threads) * size);
    }
  }
  for (int64_t at = thread + kHeld * threads; at < packs; at += threads) {
    store_codes(from_packs[at], coded, threshold, to + at * size);
  }
  for (int64_t at = packs * size + thread; at < k; at += threads) {
    const float value = to_float(from[at]);
    to[at] = static_cast<int8_t>(coded.zero || is_outlier(value, threshold) ? 0 : coded.code(value));
  }
}

template <class X>
cudaError_t launch_as(
    const Activation& x, float threshold, const Quantized& out, bool overlap, cudaStream_t stream) {
  const bool packed = reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.k % Pack<X>::size == 0 &&
                      reinterpret_cast<uintptr_t>(out.codes) % 8 == 0;
  // Few rows do not fill the GPU by their number: give each more threads.
  const int wanted = static_cast<int>(x.rows < 128 ? x.k / 8 : x.k / 16) / 32 * 32;
  const int threads = wanted < 64 ? 64 : wanted > 1024 ? 1024 : wanted;
  return launch(
      quantize_rows<X>, x.rows, threads, threads / 32 * 4, overlap, stream, static_cast<const X*>(x.data), x.k,
      packed ? x.k / Pack<X>::size : int64_t(0), out.flags == nullptr ? 0.0f : threshold, out.codes, out.row_scale,
      out.flags);
}

}  // namespace

cudaError_t launch_zero(void* data, int64_t bytes, cudaStream_t stream) {
  const int64_t blocks = divide_up(bytes, 4096);
  return launch(zero, blocks < 64 ? blocks : 64, 256, 0, false, stream, static_cast<uint32_t*>(data), bytes);
}

cudaError_t launch_quantize(
    const Activation& x, float threshold, const Quantized& out, bool overlap, cudaStream_t stream) {
  switch (x.type) {
    case Float::bf16:
      return launch_as<BF16>(x, threshold, out, overlap, stream);
    case Float::f16:
      return launch_as<F16>(x, threshold, out, overlap, stream);
    default:
      return launch_as<float>(x, threshold, out, overlap, stream);
  }
}

}  // namespace int8compile
