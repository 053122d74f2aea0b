// The provider for x86 with AVX2, FMA and F16C (Haswell, Zen and later).
//
// The product uses vpmaddwd on codes widened to int16: 16 multiplications an instruction and exact, where vpmaddubsw,
// with 32, saturates. (On magnitudes, with the signs moved to the weight by vpsignb, it would be exact; from registers
// alone that was 1.1 times as fast on two cores of Zen 3, too little for a packing of its own.) See widened.h for the
// blocking. The micro-kernel keeps 12 accumulators of 8 partial sums each in the 16 registers: 6 rows by 2 columns, or
// fewer rows by up to 4 columns. Partial sums run along K and are added up at the end of the block.

#include "kernels.h"
#include "plan.h"
#include "target.h"

#if INT8COMPILE_X86

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <limits>

INT8COMPILE_TARGET("avx2,fma,f16c")

#include "finish.h"
#include "float_product.h"
#include "quantize.h"
#include "vec_avx2.h"
#include "widened.h"

namespace int8compile {
namespace {

inline __m256i load_chunk(const int16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

inline __m256i load_chunk(const int8_t* from) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// The sums of the lanes of four registers.
inline __m128i lane_sums(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i halves = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
}

// acc += products of 16 pairs, added two by two. In assembly because compilers, left to schedule the two instructions
// themselves, hold more products than there are registers and spill the accumulators: half the speed.
inline void add_products(__m256i& acc, __m256i a, __m256i b) {
  __m256i products;
  __asm__("vpmaddwd %2, %3, %0\n\tvpaddd %0, %1, %1" : "=&x"(products), "+x"(acc) : "x"(a), "x"(b));
}

struct Avx2Micro {
  static constexpr int64_t max_rows = 6;

  template <int rows, int cols, class Code>
  static void block(
      const int16_t* panel, const Code* weight, int64_t stride, int64_t chunks, int64_t last, bool add, int32_t* sums) {
    __m256i acc[rows][cols];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        acc[r][n] = _mm256_setzero_si256();
      }
    }
    const int64_t steps = chunks + (last != kNone);
    for (int64_t c = 0; c < steps; ++c) {
      const Code* right = weight + (c < chunks ? c * kChunk : last);
      if (sizeof(Code) == 1 && c % 4 < cols) {
        // Codes that are not in a panel come from memory: ask for the next columns', a cache line of one of them a
        // chunk. (Past the end of the weight that is harmless.)
        const Code* next = right + cols * stride + c % 4 * (stride - kChunk);
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
      }
      __m256i w[cols];
      INT8COMPILE_UNROLL
      for (int n = 0; n < cols; ++n) {
        w[n] = load_chunk(right + n * stride);
      }
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        const __m256i a = load_chunk(panel + r * kChunk);
        INT8COMPILE_UNROLL
        for (int n = 0; n < cols; ++n) {
          add_products(acc[r][n], a, w[n]);
        }
      }
      panel += rows * kChunk;
    }
    put_sums<rows, cols>(acc, add, sums);
  }

  // Four registers at a time to four sums: a row of four columns, or two rows of two.
  template <int rows, int cols>
  static void put_sums(__m256i (&acc)[rows][cols], bool add, int32_t* sums) {
    constexpr int count = rows * cols;
    INT8COMPILE_UNROLL
    for (int i = 0; i < count; i += 4) {
      const auto at = [&](int j) { return j < count ? acc[j % count / cols][j % cols] : _mm256_setzero_si256(); };
      const __m128i total = lane_sums(at(i), at(i + 1), at(i + 2), at(i + 3));
      int32_t* to = sums + i / cols * kTileCols;
      if constexpr (cols == 4) {
        auto* four = reinterpret_cast<__m128i*>(to);
        _mm_storeu_si128(four, add ? _mm_add_epi32(total, _mm_loadu_si128(four)) : total);
      } else if constexpr (cols == 2) {
        put_pair(total, add, to);
        if (i + 2 < count) {
          put_pair(_mm_unpackhi_epi64(total, total), add, to + kTileCols);
        }
      } else {
        int32_t lanes[4];
        _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), total);
        for (int j = i; j < i + 4 && j < count; ++j) {
          int32_t& sum = sums[j / cols * kTileCols + j % cols];
          sum = add ? sum + lanes[j - i] : lanes[j - i];
        }
      }
    }
  }

  static void put_pair(__m128i pair, bool add, int32_t* sums) {
    auto* to = reinterpret_cast<__m128i*>(sums);
    _mm_storel_epi64(to, add ? _mm_add_epi32(pair, _mm_loadl_epi64(to)) : pair);
  }

  template <int rows, class Code>
  static void run(
      const int16_t* panel, const Code* weight, int64_t stride, int64_t cols, int64_t chunks, int64_t last, bool add,
      int32_t* sums) {
    constexpr int wide = rows <= 2 ? 4 : rows == 3 ? 3 : 2;
    int64_t n = 0;
    for (; n + wide <= cols; n += wide) {
      block<rows, wide>(panel, weight + n * stride, stride, chunks, last, add, sums + n);
    }
    for (; n < cols; ++n) {
      block<rows, 1>(panel, weight + n * stride, stride, chunks, last, add, sums + n);
    }
  }
};

constexpr Kernels kAvx2 = {
    "avx2",
    quantize_row_of<Avx2Vec>,
    residual_row_of<Avx2Vec>,
    quantize_calibrated_row_of<Avx2Vec>,
    Multipliers().with(Method::widened, {widened_product<Avx2Micro>}),
    avx2_method,
    finish_tile<Avx2Vec>,
    widen_row<Avx2Vec>,
    float_product<Avx2Vec>,
};

}  // namespace

INT8COMPILE_TARGET_END

const Kernels* avx2_kernels() {
  return &kAvx2;
}

}  // namespace int8compile

#else

const int8compile::Kernels* int8compile::avx2_kernels() {
  return nullptr;
}

#endif
