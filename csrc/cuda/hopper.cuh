// Hopper's own instructions (sm_90a): barriers in shared memory, the bulk tensor copy (TMA), wgmma.

#pragma once

#include <cuda.h>

#include "primitives.cuh"

namespace int8compile {

__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine; a block-wide barrier has to follow.
__device__ inline void mbarrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and lets the phase last until `bytes` more have been copied.
__device__ inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of this parity. Of a new barrier, phase 0 is under way and one of parity 1 is over.
__device__ inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (done == 0);
}

// Begins to copy the box at (x, y) of a matrix; counts its bytes, zeros beyond the matrix included, on the barrier.
__device__ inline void copy_box(void* to, const CUtensorMap* map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y)
      : "memory");
}

// Operand in shared memory: rows of 128 bytes of K in the 128-byte swizzle, eight rows every 1024 bytes.
__device__ inline uint64_t wgmma_operand(const void* rows) {
  constexpr uint64_t swizzle_128 = uint64_t(1) << 62, eight_rows = uint64_t(1024 >> 4) << 32, unused = uint64_t(1) << 16;
  return swizzle_128 | eight_rows | unused | (shared_address(rows) & 0x3ffff) >> 4;
}

__device__ inline void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int pending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

template <int registers>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <int registers>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// d += a [64, 32] times the transpose of b [8 * frags, 32], for the four warps of a warpgroup; d[j] is fragment C of
// mma.sync for rows 16 * warp .. and columns 8j .. . Runs on until it is waited for.
template <int frags>
__device__ void wgmma(int32_t (&d)[frags][4], uint64_t a, uint64_t b);

#define INT8COMPILE_FRAGMENT(j) "+r"(d[j][0]), "+r"(d[j][1]), "+r"(d[j][2]), "+r"(d[j][3])
#define INT8COMPILE_FRAGMENTS(j)                                                                          \
  INT8COMPILE_FRAGMENT(j), INT8COMPILE_FRAGMENT(j + 1), INT8COMPILE_FRAGMENT(j + 2),                      \
      INT8COMPILE_FRAGMENT(j + 3), INT8COMPILE_FRAGMENT(j + 4), INT8COMPILE_FRAGMENT(j + 5),              \
      INT8COMPILE_FRAGMENT(j + 6), INT8COMPILE_FRAGMENT(j + 7)

template <>
__device__ __forceinline__ void wgmma(int32_t (&d)[16][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p;}"
      : INT8COMPILE_FRAGMENTS(0), INT8COMPILE_FRAGMENTS(8)
      : "l"(a), "l"(b));
}

template <>
__device__ __forceinline__ void wgmma(int32_t (&d)[32][4], uint64_t a, uint64_t b) {
  asm volatile(
      "{.reg .pred p; setp.eq.u32 p, 0, 0; "
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p;}"
      : INT8COMPILE_FRAGMENTS(0), INT8COMPILE_FRAGMENTS(8), INT8COMPILE_FRAGMENTS(16), INT8COMPILE_FRAGMENTS(24)
      : "l"(a), "l"(b));
}

#undef INT8COMPILE_FRAGMENT
#undef INT8COMPILE_FRAGMENTS

}  // namespace int8compile
