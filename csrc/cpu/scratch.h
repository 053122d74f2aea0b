// Memory for the length of a call, and where things lie in it: for the files above the kernels, which know torch.
//
// Not for an instruction set's own files: an inline function of theirs must not be one that others share (kernels.h).

#pragma once

#include <c10/core/CPUAllocator.h>

#include <cstdint>

#include "kernels.h"

namespace int8compile {

template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : memory_(c10::GetCPUAllocator()->allocate(count * sizeof(T))) {}

  T* data() {
    return static_cast<T*>(memory_.get());
  }

 private:
  c10::DataPtr memory_;
};

inline int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Element `at` of an array of that type.
inline const char* element(const void* data, Float type, int64_t at) {
  return static_cast<const char*>(data) + at * (type == Float::f32 ? 4 : 2);
}

}  // namespace int8compile
