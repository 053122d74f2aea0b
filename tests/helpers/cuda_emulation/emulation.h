// Runs CUDA kernels on a CPU, one block after the other, a fiber a thread, so that tests see their logic without a GPU.
//
// Stands in for cuda_runtime.h and csrc/cuda/primitives.cuh when INT8COMPILE_EMULATED is defined. What makes mistakes
// show:
//   - a thread runs until it has to wait, and which one runs next is drawn at random: a missing barrier lets threads
//     get far apart;
//   - cp.async poisons its target at once and delivers when its group is waited for, not before;
//   - shared memory is poisoned before each block and exactly as large as was asked for, for AddressSanitizer;
//   - misaligned copies, bank conflicts in ldmatrix, instructions that only a part of a warp reaches, barriers that
//     some threads never reach: all end the process with a message.

#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <functional>

#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

enum cudaError_t { cudaSuccess = 0, cudaErrorNotSupported = 801 };
using cudaStream_t = void*;
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }

namespace emulation {

// Runs `kernel` for every thread of every block.
void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);

void barrier();
void fail(const char* what);

// A warp's instruction: every lane brings its operands; the last to come calls `execute` for all.
void collective(void* operands, void (*execute)(void** lanes));

template <class Operands>
void collective(Operands& operands) {
  collective(&operands, [](void** lanes) { Operands::execute(reinterpret_cast<Operands**>(lanes)); });
}

template <class T>
struct Shuffle {
  T value, result;
  int from;

  static void execute(Shuffle** lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      const int from = lanes[lane]->from;
      lanes[lane]->result = lanes[from < 0 || from > 31 ? lane : from]->value;
    }
  }
};

template <class T>
T shuffle(T value, int from) {
  Shuffle<T> operands{value, value, from};
  collective(operands);
  return operands.result;
}

inline int lane() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace emulation

#define __syncthreads() ::emulation::barrier()
inline void __threadfence() {}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulation::shuffle(value, emulation::lane() ^ mask); }
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) { return emulation::shuffle(value, emulation::lane() - distance); }

template <class T, class U>
T atomicAdd(T* at, U value) { const T old = *at; *at = old + value; return old; }
template <class T, class U>
T atomicOr(T* at, U value) { const T old = *at; *at = old | value; return old; }
template <class T, class U>
T atomicMax(T* at, U value) { const T old = *at; *at = old < value ? value : old; return old; }
template <class T>
T __ldcg(const T* at) { return *at; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
// Built with -ffp-contract=off, so each is one rounding.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
inline int __float2int_rn(float value) { return static_cast<int>(std::nearbyintf(value)); }
inline float __int_as_float(int bits) { return __builtin_bit_cast(float, bits); }
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }

namespace int8compile {

char* dynamic_shared();
void cp_async(void* to, const void* from, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait_for(int pending);
void ldmatrix_x4(uint32_t (&out)[4], const void* row);
void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

inline void cp_async_16(void* to, const void* from, bool valid) { cp_async(to, from, 16, valid); }
inline void cp_async_16_cached(void* to, const void* from, bool valid) { cp_async(to, from, 16, valid); }
inline void cp_async_4(void* to, const void* from, bool valid) { cp_async(to, from, 4, valid); }
template <int pending>
void cp_async_wait() { cp_async_wait_for(pending); }
inline void named_barrier(int, int) { emulation::fail("named barriers are not emulated"); }
inline void wait_for_previous_kernel() {}
inline void start_next_kernel() {}

float from_f16_bits(uint16_t bits);
uint16_t to_f16_bits(float value);
float from_bf16_bits(uint16_t bits);
uint16_t to_bf16_bits(float value);

}  // namespace int8compile
