// The GPU's instructions that C++ has no words for, each as a function. Tests replace this file by an emulation of the
// same functions on a CPU (tests/helpers/cuda_emulation), and so run the kernels' logic where there is no GPU.
//
// Fragments of the matrix instructions, with g = lane / 4 and t = lane % 4. A row of a fragment is 32 bytes of K: 32
// int8 or 16 16-bit values.
//   A [16 rows]  a[0]: row g, bytes 4t..4t+3    a[1]: row g + 8    a[2], a[3]: the same rows, bytes 16 + 4t..
//   B [8 cols]   b[0]: column g, bytes 4t..4t+3    b[1]: the same column, bytes 16 + 4t..
//   C [16 x 8]   c[0], c[1]: row g, columns 2t and 2t + 1    c[2], c[3]: row g + 8

#pragma once

#include <cstdint>

#ifdef INT8COMPILE_EMULATED

#include "emulation.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace int8compile {

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(1024) char shared_bytes[];
  return shared_bytes;
}

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes to shared memory without waiting; zeros instead where not `valid` (then nothing is read). Both sides
// are aligned to 16 bytes. Past L1, for what a block reads once.
__device__ inline void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

// The same through L1, for what a block reads again.
__device__ inline void cp_async_16_cached(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ inline void cp_async_4(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

// Closes the group of the copies this thread has begun since the last one.
__device__ inline void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but this thread's last `pending` groups are done. Other threads see them after a barrier.
template <int pending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 16-byte matrices: lanes 8i..8i+7 point to the rows of matrix i, and out[i] is bytes 4t.. of its row g.
__device__ inline void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ inline void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A barrier of `threads` threads of the block. Number 0 is that of __syncthreads().
__device__ inline void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Programmatic dependent launch. Waits until the kernel before, if this one was launched to overlap with it, has ended
// and its writes can be seen; nothing before this call may read what that kernel writes, or write what it reads.
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start where there is room, once every block of this one has said so.
__device__ inline void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline float from_f16_bits(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}

__device__ inline uint16_t to_f16_bits(float value) {
  return __half_as_ushort(__float2half_rn(value));
}

__device__ inline float from_bf16_bits(uint16_t bits) {
  return __int_as_float(static_cast<int>(bits) << 16);
}

__device__ inline uint16_t to_bf16_bits(float value) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

}  // namespace int8compile

#endif
