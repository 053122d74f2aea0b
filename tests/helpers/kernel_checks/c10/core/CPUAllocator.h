// c10's CPU allocator for programs without torch: exactly as large as asked for, at multiples of 64, null for nothing, as
// c10's are.

#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>

namespace c10 {

using DataPtr = std::unique_ptr<void, void (*)(void*)>;

struct Allocator {
  DataPtr allocate(size_t bytes) {
    void* memory = nullptr;
    if (bytes > 0 && posix_memalign(&memory, 64, bytes) != 0) {
      std::abort();
    }
    return DataPtr(memory, std::free);
  }
};

inline Allocator* GetCPUAllocator() {
  static Allocator allocator;
  return &allocator;
}

}  // namespace c10
