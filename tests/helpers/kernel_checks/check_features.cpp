// What csrc/cpu/cpu_features.cpp makes of the answers of CPUs and operating systems, this machine's or not.

#include <string>

#include "../../../csrc/cpu/cpu_features.h"
#include "check.h"

using namespace int8compile;

namespace {

constexpr uint32_t kFma = 1u << 12, kXsave = 1u << 27, kAvx = 1u << 28, kF16c = 1u << 29;
constexpr uint32_t kAvx2 = 1u << 5, kAvx512f = 1u << 16, kAvx512bw = 1u << 30, kAvx512vl = 1u << 31;
constexpr uint32_t kAvx512vnni = 1u << 11, kAmxTile = 1u << 24, kAmxInt8 = 1u << 25, kAvxVnni = 1u << 4;
constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

// Sapphire Rapids: everything.
CpuWords all() {
  CpuWords words;
  words.leaf1_c = kFma | kXsave | kAvx | kF16c;
  words.leaf7_b = kAvx2 | kAvx512f | kAvx512bw | kAvx512vl;
  words.leaf7_c = kAvx512vnni;
  words.leaf7_d = kAmxTile | kAmxInt8;
  words.leaf7_1_a = kAvxVnni;
  words.saved = kZmm | kTiles;
  return words;
}

std::string names(const CpuFeatures& found) {
  return std::string(found.avx2 ? "avx2 " : "") + (found.avxvnni ? "avxvnni " : "") +
      (found.avx512vnni ? "avx512vnni " : "") + (found.avx512bf16 ? "bf16 " : "") + (found.amx_int8 ? "amx" : "");
}

bool granted() {
  return true;
}

bool refused() {
  return false;
}

bool not_asked() {
  expect(false, "tiles are asked for, though something else is missing");
  return true;
}

template <class Change>
void check(const char* what, const char* want, bool (*may_use_tiles)(), Change change) {
  CpuWords words = all();
  change(words);
  const std::string found = names(features_of(words, may_use_tiles));
  expect(found == want, what, ": ", found, ", not ", want);
}

}  // namespace

void check_features() {
  check("Sapphire Rapids", "avx2 avxvnni avx512vnni amx", granted, [](CpuWords&) {});
  check("leave refused", "avx2 avxvnni avx512vnni ", refused, [](CpuWords&) {});
  check("tiles not saved", "avx2 avxvnni avx512vnni ", not_asked, [](CpuWords& w) { w.saved = kZmm; });
  check("no int8 tiles", "avx2 avxvnni avx512vnni ", not_asked, [](CpuWords& w) { w.leaf7_d = kAmxTile; });
  check("Zen 5", "avx2 avxvnni avx512vnni ", not_asked, [](CpuWords& w) { w.leaf7_d = 0; });
  check("Zen 4", "avx2 avx512vnni ", not_asked, [](CpuWords& w) { w.leaf7_d = w.leaf7_1_a = 0; });
  check("Skylake-X", "avx2 ", not_asked, [](CpuWords& w) { w.leaf7_d = w.leaf7_1_a = w.leaf7_c = 0; });
  check("no AVX512VL", "avx2 avxvnni ", not_asked, [](CpuWords& w) { w.leaf7_b &= ~kAvx512vl; });
  check("no AVX512BW", "avx2 avxvnni ", not_asked, [](CpuWords& w) { w.leaf7_b &= ~kAvx512bw; });
  check("zmm not saved", "avx2 avxvnni ", not_asked, [](CpuWords& w) { w.saved = kYmm | kTiles; });
  check("Alder Lake", "avx2 avxvnni ", not_asked, [](CpuWords& w) {
    w.leaf7_b = kAvx2;
    w.leaf7_c = w.leaf7_d = 0;
    w.saved = kYmm;
  });
  check("no FMA", "", not_asked, [](CpuWords& w) { w.leaf1_c &= ~kFma; });
  check("no F16C", "", not_asked, [](CpuWords& w) { w.leaf1_c &= ~kF16c; });
  check("no AVX2", "", not_asked, [](CpuWords& w) { w.leaf7_b &= ~kAvx2; });
  check("ymm not saved", "", not_asked, [](CpuWords& w) { w.saved = 0x2; });
  const auto pairs = [](CpuWords& w) { w.leaf7_1_a |= 1u << 5; };
  check("bfloat16 products", "avx2 avxvnni avx512vnni bf16 amx", granted, pairs);
  check("bfloat16 products, zmm not saved", "avx2 avxvnni ", not_asked, [=](CpuWords& w) {
    pairs(w);
    w.saved = kYmm | kTiles;
  });
  check("nothing", "", not_asked, [](CpuWords& w) { w = CpuWords(); });
}
