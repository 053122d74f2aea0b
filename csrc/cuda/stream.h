// The current stream of a device, and the library of what is no operator but this library's own.
//
// The stream comes from the guard that torch_cuda registers with c10, not from c10/cuda headers: those need the whole
// toolkit's headers, take a minute to compile, and tie the library to libtorch_cuda. Emulated kernels have no stream.

#pragma once

#include <c10/core/impl/VirtualGuardImpl.h>

#include "kernels.h"

namespace int8compile {

#ifdef INT8COMPILE_EMULATED

inline cudaStream_t current_stream(c10::Device) {
  return nullptr;
}

#define INT8COMPILE_LIBRARY(m) TORCH_LIBRARY_FRAGMENT(int8compile_emulated, m)

#else

inline cudaStream_t current_stream(c10::Device device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return static_cast<cudaStream_t>(guard.getStream(device).native_handle());
}

#define INT8COMPILE_LIBRARY(m) TORCH_LIBRARY_FRAGMENT(int8compile_native, m)

#endif

}  // namespace int8compile
