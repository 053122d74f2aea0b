// Attention for every CPU. See attention_block.h.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention.h"
#include "attention_block.h"
#include "vec_portable.h"

namespace int8compile {
namespace {

struct PortableForm : Widened<PortableVec> {
  static constexpr int rows = 2, vecs = 2;

  static void transpose(const void* from, int64_t from_stride, void* to, int64_t to_stride) {
    for (int64_t i = 0; i < Vec::width; ++i) {
      for (int64_t j = 0; j < Vec::width; ++j) {
        std::memcpy(
            static_cast<char*>(to) + j * to_stride + 4 * i, static_cast<const char*>(from) + i * from_stride + 4 * j, 4);
      }
    }
  }
};

constexpr AttentionKernels kPortable = attention_of<PortableForm>("portable");

}  // namespace

const AttentionKernels* portable_attention() {
  return &kPortable;
}

}  // namespace int8compile
