// Where operators are registered: each device's library compiles the files of this folder for its own tensors.
//
// INT8COMPILE_CUDA: for CUDA tensors. INT8COMPILE_EMULATED: tests run the CUDA kernels on a CPU, as operators of another
// namespace. Otherwise for CPU tensors.

#pragma once

#include <torch/library.h>

#ifdef INT8COMPILE_EMULATED
#define INT8COMPILE_NAMESPACE int8compile_emulated
#else
#define INT8COMPILE_NAMESPACE int8compile
#endif

#ifdef INT8COMPILE_CUDA
#define INT8COMPILE_KERNELS(m) TORCH_LIBRARY_IMPL(INT8COMPILE_NAMESPACE, CUDA, m)
#define INT8COMPILE_GRADIENTS(m) TORCH_LIBRARY_IMPL(INT8COMPILE_NAMESPACE, AutogradCUDA, m)
#else
#define INT8COMPILE_KERNELS(m) TORCH_LIBRARY_IMPL(INT8COMPILE_NAMESPACE, CPU, m)
#define INT8COMPILE_GRADIENTS(m) TORCH_LIBRARY_IMPL(INT8COMPILE_NAMESPACE, AutogradCPU, m)
#endif

// The namespace, or an operator in it, as text.
#define INT8COMPILE_TEXT_OF(name) #name
#define INT8COMPILE_TEXT(name) INT8COMPILE_TEXT_OF(name)
#define INT8COMPILE_OP(name) INT8COMPILE_TEXT(INT8COMPILE_NAMESPACE) "::" name
