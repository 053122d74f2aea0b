// What a launch has to know about the GPU, asked of the driver once a GPU.

#include <atomic>

#include "kernels.h"

namespace int8compile {

#ifndef INT8COMPILE_EMULATED

Gpu current_gpu() {
  constexpr int kMost = 64;
  static std::atomic<uint32_t> known[kMost];  // multiprocessors << 16 | capability; 0: not asked yet
  int index = 0;
  if (cudaGetDevice(&index) != cudaSuccess || index >= kMost) {
    return {index, 1, 80};  // the launch that follows reports the error
  }
  uint32_t packed = known[index].load(std::memory_order_relaxed);
  if (packed == 0) {
    int multiprocessors = 1, major = 8, minor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    packed = static_cast<uint32_t>(multiprocessors) << 16 | static_cast<uint32_t>(major * 10 + minor);
    known[index].store(packed, std::memory_order_relaxed);  // several threads may: they write the same
  }
  return {index, static_cast<int>(packed >> 16), static_cast<int>(packed & 0xffff)};
}

#endif

}  // namespace int8compile
