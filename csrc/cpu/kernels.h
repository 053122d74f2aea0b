// What a CPU provider of the int8 operators is made of, and the table it is chosen from.
//
// An instruction set supplies one `Kernels`: functions over plain pointers, each for one thread and one tile.
// Everything above them (shapes, threads, blocking over M and N, scratch memory) is common and lives in product.cpp;
// everything below them may use that instruction set's intrinsics and no torch header. So an ISA's file compiles fast,
// and no inline function of torch or of the standard library is ever compiled for a CPU that may not be there.
//
// Build with -ffp-contract=off: the reference rounds after every multiplication, and a compiler that fuses
// a * b + c into one rounding gives other bits.

#pragma once

#include <cstdint>

namespace int8compile {

enum class Float : uint8_t { f32, bf16, f16 };

struct BF16 {
  uint16_t bits;
};

struct F16 {
  uint16_t bits;
};

// Calls `body` with a value of the C++ type that `type` stands for.
template <class Body>
auto with_type(Float type, Body body) {
  switch (type) {
    case Float::bf16:
      return body(BF16{});
    case Float::f16:
      return body(F16{});
    default:
      return body(float{});
  }
}

// Codes, row-major; `stride` is the distance between rows. `row_sums`, or null, are the sums of whole rows, for kernels
// that take them (Kernels::row_sum).
struct Codes {
  const int8_t* data;
  int64_t stride;
  const int32_t* row_sums = nullptr;

  Codes from_row(int64_t row) const {
    return {data + row * stride, stride, row_sums == nullptr ? nullptr : row_sums + row};
  }
};

// The outlier columns of one call: which they are, and what the codes leave over in them.
struct Outliers {
  int64_t count = 0;
  const int32_t* columns = nullptr;
  const float* residual = nullptr;  // [rows, count], already rounded to x's dtype
};

// Columns whose codes have 16 bits.
struct WideColumns {
  int64_t count;
  const int32_t* at;
  const uint8_t* flags;  // the bits of all columns, eight a byte, lowest first, with four bytes of zeros behind
};

// One tile of the output on its way from int32 sums to floats.
struct Tile {
  int64_t rows, cols;
  const int32_t* sums;  // [rows, kTileCols]
  const float* row_scale;
  Codes weight;  // its first row is the tile's first column
  const float* weight_scale;
  const void* bias;  // or null
  Float bias_type;
  Outliers outliers;
  float* gathered;  // scratch, [outliers.count, cols rounded up to strips]
  void* out;
  int64_t out_stride;
  Float out_type;
  const int32_t* high_sums = nullptr;  // as sums, of the codes' high bytes, which count 128 times; or null
};

// The largest tile a thread works on at a time: int32 sums of kTileRows x kTileCols stay in its L2.
constexpr int64_t kTileRows = 192;
constexpr int64_t kTileCols = 96;
// Columns that `finish` takes at once; kTileCols is a multiple.
constexpr int64_t kStrip = 16;

// One tile of a product of float rows, of kFloatRows x kTileCols elements at most.
struct FloatTile {
  int64_t rows, cols, k;
  const float* x;  // rows as widen_row makes them
  int64_t x_stride;
  Codes weight;  // its first row is the tile's first column
  const float* weight_scale;
  const void* bias;  // or null
  Float bias_type;
  float* scratch;  // kFloatScratch floats
  void* out;
  int64_t out_stride;
  Float out_type;
};

// Rows of such a tile at most; floats that a row is padded to multiples of; features that are multiplied at a time, twice
// as many of few rows.
constexpr int64_t kFloatRows = 48;
constexpr int64_t kFloatStep = 16;
constexpr int64_t kFloatDepth = 1024;
// For each element of a tile a register of sums, and their sum; the codes of a strip that is not whole.
constexpr int64_t kFloatScratch = kFloatRows * kTileCols * (kFloatStep + 1) + kStrip * 2 * kFloatDepth / 4;

// Rows that are packed together; parts of a product begin at multiples.
constexpr int64_t kPackRows = 16;

// For providers that multiply codes in another layout than row-major: each call arranges its codes once, in scratch
// memory, and multiplies those.
struct Packing {
  // Bytes a packed row takes; kPackRows of them lie together, at a multiple of 64 bytes.
  int64_t (*row_bytes)(int64_t k);

  // kPackRows rows of codes, or the last few of a call.
  void (*pack)(Codes a, int64_t rows, int64_t k, int8_t* packed);

  // A thread calls begin() before it multiplies and end() after: state of the CPU that other code must not find.
  void (*begin)();
  void (*end)();
};

// The ways to multiply. A provider has one or several; plan.cpp says which of them a call takes. Their sums are the same.
enum class Method : uint8_t { widened, dot, panel, amx };
constexpr int kMethods = 4;

// One of them, as a provider has it.
struct Multiplier {
  // sums [rows, kTileCols] = a [rows, k] times the transpose of b [cols, k], exact in int32 for every int8 value.
  // a.row_sums may be null: then they are added up where they are needed, once a tile.
  void (*multiply)(Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) = nullptr;

  // Or null. Then `a` is what it packs: its stride is row_bytes(k), its first row a multiple of kPackRows.
  const Packing* packing = nullptr;

  // What it can compute.
  int64_t least_k = 0;
};

// Those of a provider: Multipliers().with(Method::dot, {...}).with(Method::panel, {...}).
struct Multipliers {
  Multiplier of[kMethods];

  constexpr Multipliers with(Method method, Multiplier multiplier) const {
    Multipliers made = *this;
    made.of[int(method)] = multiplier;
    return made;
  }

  constexpr const Multiplier& operator[](Method method) const {
    return of[int(method)];
  }

  constexpr bool can(Method method, int64_t k) const {
    return of[int(method)].multiply != nullptr && k >= of[int(method)].least_k;
  }
};

// What a call multiplies: [rows, k] by [cols, k], on so many threads.
struct Sizes {
  int64_t rows, cols, k;
  int threads;
};

struct Kernels {
  const char* name;

  // codes [k] of the row x [k]; returns its scale. Sets outliers[c] = 1 where |x[c]| >= threshold; null: looks for none.
  // Other threads may be setting the same bytes.
  float (*quantize_row)(const void* x, Float type, int64_t k, float threshold, int8_t* codes, uint8_t* outliers);

  // residual[t] = x - scale * codes at outlier column t, rounded to x's dtype; 0 where |x| < from.
  void (*residual_row)(
      const void* x, Float type, const int8_t* codes, float scale, float from, int64_t count, const int32_t* columns,
      float* residual);

  // The same as quantize_row where some columns have 16-bit codes, 128 high + low with a low between -64 and 63: `high`
  // [columns.count], and in those columns of `codes` the low.
  float (*quantize_calibrated_row)(
      const void* x, Float type, int64_t k, const WideColumns& columns, int8_t* codes, int8_t* high);

  Multipliers multipliers;

  // The one that is taken where nothing else was asked for: one of plan.cpp's.
  Method (*method)(const Sizes& sizes);

  // Scales, the outlier product, bias and the one rounding to the output's dtype.
  void (*finish)(const Tile& tile);

  // to [k, rounded up to a multiple of kFloatStep] = the row x [k] as floats, zeros behind.
  void (*widen_row)(const void* x, Float type, int64_t k, float* to);

  // A tile of the product of float rows: fp32 sums, scales, bias and the one rounding to the output's dtype. What an
  // element comes to depends on its row and column alone.
  void (*float_product)(const FloatTile& tile);

  // The sum of a row's k codes, or null where no multiplier has a use for it.
  int32_t (*row_sum)(const int8_t* codes, int64_t k) = nullptr;
};

// The provider in use: the best this CPU runs, or what set_isa() asked for.
const Kernels& kernels();

// One function a file. Those for another architecture than the one compiled for, and those that the compiler is too old
// for, return null.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avxvnni_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* amx_kernels();

}  // namespace int8compile
