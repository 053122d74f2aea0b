// The product of up to 8 rows, which is the time it takes to stream the weight: decoding.
//
// The weight's rows are the A operand of mma, 16 at a time, and the activation's rows its 8 columns. Which codes of K
// an instruction multiplies is free to choose, as long as both operands choose the same: lane (g, t) takes the 16
// contiguous codes at 16t of a segment of 64, so that every load is 16 bytes and the weight needs no repacking. Each
// thread copies, by cp.async and several segments ahead, what it will multiply itself: no barrier until the eight warps
// of a block, which share K, add up their sums of 16 rows.
//
// A block has a range of the weight's rows of its own, cut so that all blocks read the same number. `fused`: it also
// quantises the whole activation, into shared memory, while its first copies are under way; that is cheaper than a
// kernel ahead of this one as long as the activation is small, and is where a single token's linear is one kernel.

#include "launch.cuh"
#include "outliers.cuh"
#include "quantize.cuh"

namespace int8compile {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kRows = 16;  // of the weight at a time
constexpr int kTokens = kSkinnyRows;
constexpr int kLanes = kThreads / kRows;  // that a row of the weight has in the epilogue
static_assert(kLanes == 2 * kTokens);
constexpr int kSegment = 64;
constexpr int kDepth = 5;  // segments of a warp under way, and the one in use

struct SkinnyArguments {
  Activation x;
  Quantized q;
  Product p;
  Thresholds thresholds;
};

// Shared memory, in order. Two of `sums` and `words`, so that one can be read while the next is written.
struct Layout {
  int slots, sums, words, residual, columns, scratch, scale, codes, flags, bytes;

  __host__ __device__ constexpr Layout(bool fused, int64_t rows, int64_t k)
      : slots(0), sums(slots + kDepth * (fused ? 2 : 3) * kThreads * 16),
        words(sums + 2 * kWarps * kRows * kTokens * 4), residual(words + 2 * kRows * kListed * 4),
        columns(residual + kListed * kTokens * 4), scratch(columns + kListed * 4),
        scale(scratch + kListScratch * 4), codes(scale + 2 * kTokens * 4),
        flags(codes + (fused ? static_cast<int>(rows * k) : 0)), bytes(flags + (fused ? static_cast<int>(k) : 0)) {}
};

template <bool fused>
struct Skinny {
  const SkinnyArguments& args;
  char* shared;
  Layout layout;
  int64_t begin, end;  // this block's rows of the weight
  int64_t k;
  int rows, thread, warp, group, quad;  // rows: of the activation; lane = 4 * group + quad

  __device__ explicit Skinny(const SkinnyArguments& args)
      : args(args), shared(dynamic_shared()), layout(fused, args.x.rows, args.x.k),
        begin(first_row(blockIdx.x)), end(first_row(blockIdx.x + 1)), k(args.x.k), rows(static_cast<int>(args.x.rows)),
        thread(threadIdx.x), warp(thread / 32), group(thread % 32 / 4), quad(thread % 4) {}

  // Where a block's rows begin, such that all have the same number, or one more. (A division of 64 bits is a call.)
  __device__ int64_t first_row(unsigned block) const {
    const auto cols = static_cast<unsigned>(args.p.cols);
    const unsigned share = cols / gridDim.x, more = cols % gridDim.x;
    return int64_t(block) * share + (block < more ? block : more);
  }

  template <class T>
  __device__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }

  __device__ const uint8_t* flags() const {
    return fused ? at<uint8_t>(layout.flags) : args.q.flags;
  }

  __device__ const int8_t* codes() const {
    return fused ? at<int8_t>(layout.codes) : args.q.codes;
  }

  __device__ float scale(int row) const {
    return fused ? at<float>(layout.scale)[row] : args.q.row_scale[row];
  }

  // Part `part` of a segment: weight rows `group` and `group + 8`, or row `group` of the codes.
  __device__ uint4* slot(int segment, int part) const {
    return at<uint4>(layout.slots) + (segment % kDepth * (fused ? 2 : 3) + part) * kThreads + thread;
  }

  // All of x into codes and flags in shared memory. Ends with a barrier.
  template <class X>
  __device__ __forceinline__ void quantize() const {
    int* most = at<int>(layout.scale) + kTokens;
    auto* words = at<uint32_t>(layout.flags);
    const auto* x = static_cast<const X*>(args.x.data);
    constexpr int size = Pack<X>::size;
    const int packs = static_cast<int>(k) / size;
    for (int i = thread; i < k / 4; i += kThreads) {
      words[i] = 0;
    }
    if (thread < kTokens) {
      most[thread] = 0;
    }
    __syncthreads();
    const auto flag = [&](int64_t column) { atomicOr(words + column / 4, 1u << (column % 4 * 8)); };
    for (int row = 0; row < rows; ++row) {
      const auto* from = reinterpret_cast<const Pack<X>*>(x + row * k);
      int mine = 0;
      for (int i = thread; i < packs; i += kThreads) {
        mine = larger(mine, from[i], args.thresholds.outlier, int64_t(i) * size, flag);
      }
      mine = warp_max(mine);
      if (thread % 32 == 0) {
        atomicMax(most + row, mine);
      }
    }
    __syncthreads();
    for (int row = 0; row < rows; ++row) {
      const auto* from = reinterpret_cast<const Pack<X>*>(x + row * k);
      const RowCode coded(most[row]);
      for (int i = thread; i < packs; i += kThreads) {
        store_codes(from[i], coded, args.thresholds.outlier, at<int8_t>(layout.codes) + row * k + i * size);
      }
      if (thread == 0) {
        at<float>(layout.scale)[row] = coded.scale;
      }
    }
    __syncthreads();
  }

  // Lists outlier columns first .. first + kListed and what is left over of x in them; how many there are in all. The
  // columns can be read at once, the rest after a barrier.
  __device__ __forceinline__ int list(int first) const {
    const Group block{thread, kThreads, 0};
    const int count = list_columns(block, flags(), k, first, kListed, at<int32_t>(layout.columns), at<int>(layout.scratch));
    for (int i = thread; i < kListed * kTokens; i += kThreads) {
      const int row = i / kListed;
      float value = 0.0f;
      if (row < rows && first + i % kListed < count) {
        const int64_t from = row * k + at<int32_t>(layout.columns)[i % kListed];
        value = round_to(
            residual_of(
                load_float(args.x.data, args.x.type, from), scale(row), codes()[from], args.thresholds.residual_from),
            args.x.type);
      }
      at<float>(layout.residual)[i] = value;
    }
    return count;
  }

  // Begins to copy this thread's share of segment `step` of its warp, of the tile of weight rows at `row`.
  __device__ void fetch_weight(int segment, int64_t row, int step) const {
    const int64_t from = (int64_t(step) * kWarps + warp) * kSegment + quad * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t mine = row + group + half * 8;
      const bool there = mine < end && from < k;
      cp_async_16(slot(segment, half), there ? args.p.weight + mine * args.p.weight_stride + from : args.p.weight, there);
    }
  }

  __device__ void fetch_codes(int segment, int step) const {
    if constexpr (!fused) {
      const int64_t from = (int64_t(step) * kWarps + warp) * kSegment + quad * 16;
      const bool there = group < rows && from < k;
      cp_async_16_cached(slot(segment, 2), there ? args.q.codes + group * k + from : args.q.codes, there);
    }
  }

  // Begins to copy the words that hold the weights of the listed columns, of the tile at `row`.
  __device__ void fetch_outliers(int64_t row, int parity, int count) const {
    for (int i = thread; i < kRows * kListed; i += kThreads) {
      const int t = i % kListed;
      if (t < count) {
        const int64_t mine = row + i / kListed;
        const int64_t column = at<int32_t>(layout.columns)[t] & ~3;
        const bool there = mine < end;
        cp_async_4(
            at<uint32_t>(layout.words) + parity * kRows * kListed + i,
            there ? args.p.weight + mine * args.p.weight_stride + column : args.p.weight, there);
      }
    }
  }

  __device__ void multiply(int segment, int step, int32_t (&sums)[4]) const {
    const uint4 upper = *slot(segment, 0), lower = *slot(segment, 1);
    uint4 b = make_uint4(0, 0, 0, 0);
    if constexpr (fused) {
      const int64_t from = (int64_t(step) * kWarps + warp) * kSegment + quad * 16;
      if (group < rows && from < k) {
        b = *reinterpret_cast<const uint4*>(codes() + group * k + from);
      }
    } else {
      b = *slot(segment, 2);
    }
    const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y}, second[4] = {upper.z, lower.z, upper.w, lower.w};
    mma_s8(sums, first, b.x, b.y);
    mma_s8(sums, second, b.z, b.w);
  }

  // The outlier product of a weight row and activation row `token` in the listed columns, from the words fetched of the
  // weight row. The 16 lanes of the weight row share the columns; `count` is at least 1.
  __device__ float outlier_product(const uint32_t* words, int token, int count) const {
    const int lane = thread % kLanes;
    float weight[kListed / kLanes];
#pragma unroll
    for (int i = 0; i < kListed / kLanes; ++i) {
      const int t = lane + i * kLanes;
      const int shift = t < count ? at<int32_t>(layout.columns)[t] % 4 * 8 : 0;
      weight[i] = t < count ? static_cast<float>(static_cast<int8_t>(words[t] >> shift)) : 0.0f;
    }
    float product = 0.0f;
#pragma unroll 1
    for (int row = 0; row < rows; ++row) {
      const float* residual = at<float>(layout.residual) + row * kListed + lane;
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < kListed / kLanes; ++i) {
        sum = __fmaf_rn(residual[i * kLanes], weight[i], sum);
      }
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2) {
        sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, distance));
      }
      product = row == token ? sum : product;
    }
    return product;
  }

  // The same in the columns beyond the first kListed, for which the lists have to be made anew, and then for the first
  // ones again: slow. Called by all threads.
  __device__ __forceinline__ float more_outliers(int64_t row, int token, int count) const {
    float sum = 0.0f;
    for (int first = kListed; first < count + kListed; first += kListed) {
      const bool again = first >= count;
      list(again ? 0 : first);  // whose own barrier comes before it writes what others may still be reading
      __syncthreads();
      for (int t = 0; !again && t < kListed && first + t < count && row < end; ++t) {
        const int8_t code = args.p.weight[row * args.p.weight_stride + at<int32_t>(layout.columns)[t]];
        sum = __fmaf_rn(at<float>(layout.residual)[token * kListed + t], static_cast<float>(code), sum);
      }
    }
    return sum;
  }

  // The tile at `row`: adds up the warps' sums and writes the output.
  __device__ __forceinline__ void finish(int64_t row, int parity, int count, const int32_t (&sums)[4]) const {
    int32_t* all = at<int32_t>(layout.sums) + parity * kWarps * kRows * kTokens;
    int32_t* mine = all + warp * kRows * kTokens;
    mine[group * kTokens + quad * 2] = sums[0];
    mine[group * kTokens + quad * 2 + 1] = sums[1];
    mine[(group + 8) * kTokens + quad * 2] = sums[2];
    mine[(group + 8) * kTokens + quad * 2 + 1] = sums[3];
    __syncthreads();  // sums and fetched words are there; two tiles on, their place is free again
    // Each row of the weight has 16 lanes, two a token.
    const int tile_row = thread / kLanes, token = thread % kTokens, half = thread % kLanes / kTokens;
    const int64_t col = row + tile_row;
    const float more = count > kListed ? more_outliers(col, token, count) : 0.0f;
    int32_t total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; w += 2) {
      total += all[((w + half) * kRows + tile_row) * kTokens + token];
    }
    total += __shfl_xor_sync(0xffffffff, total, kTokens);
    float value = __fmul_rn(__int2float_rn(total), token < rows ? scale(token) : 0.0f);
    if (count > 0) {
      const auto* words = at<uint32_t>(layout.words) + (parity * kRows + tile_row) * kListed;
      value = __fadd_rn(value, __fadd_rn(outlier_product(words, token, count), more));
    }
    if (half == 0 && col < end && token < rows) {
      const Column column(args.p, col);
      store_float(args.p.out, args.p.out_type, int64_t(token) * args.p.cols + col, column.finish(value));
    }
  }

  __device__ __forceinline__ void run() const {
    const int steps = static_cast<int>(divide_up(divide_up(k, kSegment), kWarps));
    const int segments = static_cast<int>((end - begin + kRows - 1) / kRows) * steps;
    int64_t next_row = begin;
    int next = 0, next_step = 0;  // the segment that is fetched next
    const auto advance = [&] {
      ++next;
      if (++next_step == steps) {
        next_step = 0;
        next_row += kRows;
      }
    };
    for (int i = 0; i < kDepth - 1 && i < segments; ++i) {
      fetch_weight(next, next_row, next_step);
      advance();
    }
    wait_for_previous_kernel();
    for (int i = 0; i < kDepth - 1; ++i) {
      if (i < segments) {
        fetch_codes(i, i % steps);
      }
      cp_async_commit();
    }
    if constexpr (fused) {
      switch (args.x.type) {
        case Float::bf16:
          quantize<BF16>();
          break;
        case Float::f16:
          quantize<F16>();
          break;
        default:
          quantize<float>();
      }
    }
    const bool looks = fused ? args.thresholds.outlier > 0 : args.q.flags != nullptr;
    const int count = looks ? list(0) : 0;
    const int listed = count < kListed ? count : kListed;

    int32_t sums[4] = {0, 0, 0, 0};
    int64_t row = begin;
    int step = 0, parity = 0;
    for (int segment = 0; segment < segments; ++segment) {
      cp_async_wait<kDepth - 2>();
      multiply(segment, step, sums);
      if (next < segments) {
        fetch_weight(next, next_row, next_step);
        fetch_codes(next, next_step);
        advance();
      }
      if (step == 0 && listed > 0) {
        fetch_outliers(row, parity, listed);
      }
      cp_async_commit();
      if (++step < steps) {
        continue;
      }
      if (steps < kDepth) {
        cp_async_wait<0>();  // otherwise the waits since the words were fetched have covered them
      }
      finish(row, parity, count, sums);
      sums[0] = sums[1] = sums[2] = sums[3] = 0;
      row += kRows;
      step = 0;
      parity ^= 1;
    }
  }
};

template <bool fused>
__global__ void __launch_bounds__(kThreads, 2) skinny(const __grid_constant__ SkinnyArguments args) {
  Skinny<fused>(args).run();
}

}  // namespace

cudaError_t launch_skinny(
    const Activation& x, const Quantized& q, const Product& p, Thresholds thresholds, bool fused, bool overlap,
    cudaStream_t stream) {
  const int64_t wanted = divide_up(p.cols, 8), most = 2 * int64_t(current_gpu().multiprocessors);
  const int64_t blocks = wanted < most ? wanted : most;
  const SkinnyArguments args{x, q, p, thresholds};
  const Layout layout(fused, x.rows, x.k);
  return fused ? launch(skinny<true>, blocks, kThreads, layout.bytes, overlap, stream, args)
               : launch(skinny<false>, blocks, kThreads, layout.bytes, overlap, stream, args);
}

}  // namespace int8compile
