// Attention above its kernels: blocks of queries for threads, and what a mask says of each.
//
// A thread takes the next block that nobody has, the one with the most keys first where queries see the keys up to their
// own number; no number depends on which thread computes it, nor on how many there are, nor on the blocks.

#include "attention.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "scratch.h"

namespace int8compile {
namespace {

// Rows of a block, the heads of a group together: enough to pay for packing keys, few enough to stay in L2.
constexpr int64_t kBlockRows = 192;
constexpr int64_t kMostQueries = 128;
constexpr int64_t kFewestQueries = 16;
constexpr int64_t kGrain = 16384;  // scores worth a thread
constexpr int64_t kFewGrain = 2048;  // of few rows, which read keys and values for a row or two

// Positions in a block.
int64_t block_size(const Attention& call, int64_t threads) {
  int64_t size = std::min(call.queries, std::clamp<int64_t>(kBlockRows / call.group(), 1, kMostQueries));
  while (size > kFewestQueries && call.batch * call.kv_heads * divide_up(call.queries, size) < 2 * threads) {
    size = divide_up(size, 2);
  }
  return size;
}

// The summaries of a mask, for each of its batches, heads and blocks of queries.
class Summaries {
 public:
  Summaries(const AttentionKernels& use, const Attention& call, int64_t block)
      : keys_(divide_up(call.keys, kKeyBlock)),
        blocks_(call.mask.row == 0 ? 1 : divide_up(call.queries, block)),
        heads_(call.mask.head == 0 ? 1 : call.heads),
        batches_(call.mask.batch == 0 ? 1 : call.batch) {
    if (call.mask_type == MaskType::none) {
      return;
    }
    table_.resize(batches_ * heads_ * blocks_ * keys_);
    const int64_t grain = divide_up(kGrain, std::max<int64_t>(1, block * call.keys));
    at::parallel_for(0, batches_ * heads_ * blocks_, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks_ * block;
        use.summarize(
            call, i / blocks_ / heads_, i / blocks_ % heads_, first, std::min(block, call.queries - first),
            table_.data() + i * keys_);
      }
    });
  }

  void set(QueryBlock& block, int64_t index) const {
    block.mask_heads = heads_ == 1 ? 1 : block.call->group();
    block.summary_stride = blocks_ * keys_;
    if (!table_.empty()) {
      const int64_t batch = batches_ == 1 ? 0 : block.batch;
      const int64_t head = heads_ == 1 ? 0 : block.kv_head * block.call->group();
      block.summaries = table_.data() + ((batch * heads_ + head) * blocks_ + (blocks_ == 1 ? 0 : index)) * keys_;
    }
  }

 private:
  int64_t keys_, blocks_, heads_, batches_;
  std::vector<MaskSummary> table_;
};

}  // namespace

void attend(const AttentionKernels& use, const Attention& call) {
  const int64_t threads = at::get_num_threads();
  if (call.batch * call.heads * call.queries * call.value_width == 0) {
    return;
  }
  const int64_t size = block_size(call, threads), blocks = divide_up(call.queries, size);
  const Summaries summaries(use, call, size);
  const int64_t scratch = use.scratch_bytes(call, size), count = call.batch * call.kv_heads * blocks;
  const int64_t scores = call.batch * call.heads * call.queries * std::max<int64_t>(call.keys, 1);
  const int64_t grain = call.has_few_rows() ? kFewGrain : kGrain;
  const int64_t workers = std::clamp<int64_t>(std::min(count, scores / grain), 1, threads);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    Scratch<char> memory(scratch);
    for (int64_t i = taken++; i < count; i = taken++) {
      const int64_t heads = i % (call.batch * call.kv_heads), index = blocks - 1 - i / (call.batch * call.kv_heads);
      QueryBlock block = {};
      block.call = &call;
      block.batch = heads / call.kv_heads;
      block.kv_head = heads % call.kv_heads;
      block.first = index * size;
      block.count = std::min(size, call.queries - block.first);
      block.scratch = memory.data();
      summaries.set(block, index);
      use.attend(block);
    }
  });
}

}  // namespace int8compile
