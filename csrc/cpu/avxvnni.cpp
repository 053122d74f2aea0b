// The provider for x86 with AVX2 and int8 dot products on its registers (Alder Lake, Sierra Forest, Zen 5 and later).
//
// The products are vnni.h's and panel.h's; the rest is AVX2's. (AVX-VNNI-INT8, which multiplies signed by signed codes, would save one
// exclusive or a weight register. The CPUs that have it are few, and the loads are the bound there.)

#include "kernels.h"
#include "plan.h"
#include "target.h"

#if INT8COMPILE_X86_2021

#include <immintrin.h>

#include <cstdint>
#include <cstring>

INT8COMPILE_TARGET("avx2,fma,f16c,avxvnni")

#include "transpose_avx2.h"

#include "panel.h"
#include "vnni.h"

namespace int8compile {
namespace {

struct YmmLanes {
  using Register = __m256i;
  static constexpr int64_t width = 32;

  // Of 16 registers: up to 12 accumulators.
  static constexpr int block_cols(int rows) {
    return rows == 1 ? 8 : rows == 2 ? 4 : rows == 3 ? 3 : 2;
  }

  // 12 accumulators, three registers of weights and a broadcast.
  static constexpr int panel_rows = 4;

  static __m256i zero() {
    return _mm256_setzero_si256();
  }

  static __m256i ones() {
    return _mm256_set1_epi8(1);
  }

  static __m256i load(const int8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  static __m256i load_first(const int8_t* from, int64_t count) {
    int8_t padded[width] = {};
    std::memcpy(padded, from, count);
    return load(padded);
  }

  static __m256i of_all(int32_t value) {
    return _mm256_set1_epi32(value);
  }

  static __m256i load_sums(const int32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  static void store_sums(int32_t* to, __m256i sums) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), sums);
  }

  static __m256i flip_sign(__m256i codes) {
    return _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
  }

  // acc += products, added four by four. In assembly because compilers, given the intrinsic, copy accumulators from
  // register to register and run out of them.
  static void add_products(__m256i& acc, __m256i shifted, __m256i codes) {
#if defined(INT8COMPILE_EMULATED_ISA)
    acc = _mm256_dpbusd_avx_epi32(acc, shifted, codes);
#else
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(shifted), "x"(codes));
#endif
  }

  static __m128i sums(__m256i a, __m256i b, __m256i c, __m256i d) {
    const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
  }
};

}  // namespace

INT8COMPILE_TARGET_END

const Kernels* avxvnni_kernels() {
  static const Kernels table = [] {
    Kernels made = *avx2_kernels();
    made.name = "avxvnni";
    made.multipliers =
        Multipliers().with(Method::dot, {Vnni<YmmLanes>::product}).with(Method::panel, {Panel<YmmLanes>::product});
    made.method = avxvnni_method;
    made.row_sum = Vnni<YmmLanes>::row_sum;
    return made;
  }();
  return &table;
}

}  // namespace int8compile

#else

const int8compile::Kernels* int8compile::avxvnni_kernels() {
  return nullptr;
}

#endif
