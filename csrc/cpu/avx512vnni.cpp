// The provider for x86 with AVX512 and its int8 dot products (Cascade Lake, Zen 4 and later). See vnni.h and, for many
// rows, panel.h.

#include "kernels.h"
#include "plan.h"
#include "target.h"

#if INT8COMPILE_X86

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx512f,avx512bw,avx512vl,avx512vnni")

#include "transpose.h"

#include "finish.h"
#include "float_product.h"
#include "panel.h"
#include "quantize.h"
#include "scan_avx512.h"
#include "vec_avx512.h"
#include "vnni.h"

namespace int8compile {
namespace {

struct ZmmLanes {
  using Register = __m512i;
  static constexpr int64_t width = 64;

  // Of 32 registers: up to 24 accumulators, and 8 columns at most, since each is a stream from memory.
  static constexpr int block_cols(int rows) {
    return rows <= 3 ? 8 : 4;
  }

  // 24 accumulators, three registers of weights and a broadcast.
  static constexpr int panel_rows = 8;

  static __m512i zero() {
    return _mm512_setzero_si512();
  }

  static __m512i ones() {
    return _mm512_set1_epi8(1);
  }

  static __m512i load(const int8_t* from) {
    return _mm512_loadu_si512(from);
  }

  static __m512i load_first(const int8_t* from, int64_t count) {
    return _mm512_maskz_loadu_epi8((__mmask64(1) << count) - 1, from);
  }

  static __m512i of_all(int32_t value) {
    return _mm512_set1_epi32(value);
  }

  static __m512i load_sums(const int32_t* from) {
    return _mm512_loadu_si512(from);
  }

  static void store_sums(int32_t* to, __m512i sums) {
    _mm512_storeu_si512(to, sums);
  }

  static __m512i flip_sign(__m512i codes) {
    return _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
  }

  // acc += products, added four by four. In assembly because compilers, given the intrinsic, copy accumulators from
  // register to register and run out of them.
  static void add_products(__m512i& acc, __m512i shifted, __m512i codes) {
#if defined(INT8COMPILE_EMULATED_ISA)
    acc = _mm512_dpbusd_epi32(acc, shifted, codes);
#else
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(shifted), "v"(codes));
#endif
  }

  static __m128i sums(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
  }
};

constexpr Kernels kAvx512Vnni = {
    "avx512vnni",
    quantize_row_of<Avx512Vec>,
    residual_row_of<Avx512Vec>,
    quantize_calibrated_row_of<Avx512Vec>,
    Multipliers().with(Method::dot, {Vnni<ZmmLanes>::product}).with(Method::panel, {Panel<ZmmLanes>::product}),
    avx512vnni_method,
    finish_tile<Avx512Vec>,
    widen_row<Avx512Vec>,
    float_product<Avx512Vec>,
    Vnni<ZmmLanes>::row_sum,
};

}  // namespace

INT8COMPILE_TARGET_END

const Kernels* avx512vnni_kernels() {
  return &kAvx512Vnni;
}

}  // namespace int8compile

#else

const int8compile::Kernels* int8compile::avx512vnni_kernels() {
  return nullptr;
}

#endif
