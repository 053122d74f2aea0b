// Queues a kernel on a stream; returns what the launch itself reports, never waits.

#pragma once

#include "kernels.h"
#include "primitives.cuh"

namespace int8compile {

#ifdef INT8COMPILE_EMULATED

template <class... Params, class... Args>
cudaError_t launch(
    void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, bool, cudaStream_t, const Args&... args) {
  emulation::run(blocks, threads, shared_bytes, [&] { kernel(args...); });
  return cudaSuccess;
}

#else

// A launch above 48 KB of shared memory has to be allowed, on each GPU; that is a call of well under a microsecond,
// which is simpler than to remember where it was made.
template <class... Params, class... Args>
cudaError_t launch(
    void (*kernel)(Params...), int64_t blocks, int threads, int shared_bytes, bool overlap, cudaStream_t stream,
    const Args&... args) {
  if (blocks == 0) {
    return cudaSuccess;
  }
  if (shared_bytes > 48 * 1024) {
    const cudaError_t allowed =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (allowed != cudaSuccess) {
      return allowed;
    }
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap && current_gpu().capability >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

#endif

}  // namespace int8compile
