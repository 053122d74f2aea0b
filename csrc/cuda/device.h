// Where the operators are registered and which stream they use: CUDA's, or, for tests that emulate the kernels on a
// CPU, those of CPU tensors under another namespace.
//
// The stream comes from the guard that torch_cuda registers with c10, not from c10/cuda headers: those need the whole
// toolkit's headers, take a minute to compile, and tie the library to libtorch_cuda.

#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "kernels.h"

namespace int8compile {

#ifdef INT8COMPILE_EMULATED

constexpr c10::DeviceType kDevice = c10::DeviceType::CPU;

inline cudaStream_t current_stream(c10::Device) {
  return nullptr;
}

#define INT8COMPILE_LIBRARY(m) TORCH_LIBRARY_FRAGMENT(int8compile_emulated, m)
#define INT8COMPILE_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(int8compile_emulated, CPU, m)

#else

constexpr c10::DeviceType kDevice = c10::DeviceType::CUDA;

inline cudaStream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

#define INT8COMPILE_LIBRARY(m) TORCH_LIBRARY_FRAGMENT(int8compile_native, m)
#define INT8COMPILE_LIBRARY_IMPL(m) TORCH_LIBRARY_IMPL(int8compile, CUDA, m)

#endif

}  // namespace int8compile
