// Attention of many queries: softmax(query . key * scale + mask) . value, without the matrix of scores in memory.
//
// As in kernels.h, an instruction set supplies functions over plain pointers, each for one thread and one block of
// queries; what is above them (threads, scratch memory, what a mask says of each block) is attention.cpp.
//
// The floor: a score costs 2 D multiplications, D a head's width. With D = 64 that is 8 instructions of 16 lanes, 4 cycles
// of two FMA units, and 1 more for the exponential with all that is around it. On the Emerald Rapids where this was
// written the products run at that floor and are two thirds of the time. PyTorch's kernel takes 6 cycles (float32) to 10
// (bfloat16) a score there, hidden ones included. So what there is to win is what a mask hides, and the 16-bit dtypes.
// bfloat16's own dot products are worth less than widening to float32 there: attention_providers.cpp.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace int8compile {

// Keys that are multiplied at a time: their scores, of a few queries, stay in L1.
constexpr int64_t kKeyBlock = 64;

// Rows of a group that packing keys and values does not pay for (attention_few.h). A row's result does not depend on the
// rows beside it, but for a rounding on whether they are few.
constexpr int64_t kFewRows = 8;

// [batch, head, row, column] as it lies in memory: columns are contiguous, the distances of the rest in elements.
struct Heads {
  const void* data;
  int64_t batch, head, row;
};

enum class MaskType : uint8_t { none, boolean, added };  // the last in the tensors' dtype

struct Attention {
  int64_t batch, heads, kv_heads, queries, keys;
  int64_t width, value_width;  // D of query and key, and of value
  Float type;
  Heads query, key, value;
  Heads out;  // written
  MaskType mask_type;
  Heads mask;  // [batch, head, query, key]; distances may be 0
  float scale;
  bool causal;  // a query sees the keys up to its own number

  int64_t group() const {
    return heads / kv_heads;
  }

  bool has_few_rows() const {
    return group() * queries <= kFewRows;
  }
};

// What a mask says of a block of queries and keys, over all queries of the block.
struct MaskSummary {
  float largest;  // -inf: no query sees a key; +inf: not to be relied on
  bool zero;  // nothing is added to any score
};

// The queries of one group of heads that a thread attends at a time, all heads of the group at the same positions.
struct QueryBlock {
  const Attention* call;
  int64_t batch, kv_head, first, count;  // positions
  // For each of the heads that have a mask of their own, `summary_stride` apart: one for each block of keys. Or null.
  const MaskSummary* summaries;
  int64_t mask_heads, summary_stride;
  void* scratch;  // of scratch_bytes(), at a multiple of 64
};

struct AttentionKernels {
  const char* name;

  // Whether it reads tensors of a dtype.
  bool (*takes)(Float type);

  // What `attend` needs for blocks of up to `count` positions.
  int64_t (*scratch_bytes)(const Attention& call, int64_t count);

  void (*attend)(const QueryBlock& block);

  // summaries[i] of key block i, for `count` positions from `first` on.
  void (*summarize)(
      const Attention& call, int64_t batch, int64_t head, int64_t first, int64_t count, MaskSummary* summaries);
};

// Attends every query, with threads.
void attend(const AttentionKernels& use, const Attention& call);

// One function a file; null as in kernels.h.
const AttentionKernels* portable_attention();
const AttentionKernels* avx2_attention();
const AttentionKernels* avx512_attention();
const AttentionKernels* avx512bf16_attention();

}  // namespace int8compile
