// Runs csrc/cpu's providers, on this machine's instructions or on emulated ones.
//
//   check kernels NAME   each function of a provider against the portable one's and against plain loops, on memory of
//                        exactly the right size; and which method is taken when
//   check product NAME   whole calls through product.cpp, with threads
//   check here           both, for every provider that this machine has; prints their names
//   check attention NAME whole calls of a set of kernels of attention, with threads, against plain loops
//   check features       what is made of CPUs' answers, of those that have an instruction set and those that have not
//   check selfcheck      that the self-check passes right providers and rejects wrong ones
//
// Prints a line and exits with 1 at the first difference; aborts where an emulated CPU would raise.

#include "check.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../../../csrc/cpu/cpu_features.h"
#include "../../../csrc/cpu/providers.h"
#include "../../../csrc/cpu/selfcheck.h"

namespace int8compile {

static const Kernels* chosen = portable_kernels();

const Kernels& kernels() {
  return *chosen;
}

#if defined(INT8COMPILE_EMULATED_ISA)
// What avxvnni.cpp takes over from AVX2's provider, which runs on the machines that test this, is not emulated.
const Kernels* avx2_kernels() {
  return portable_kernels();
}
#endif

}  // namespace int8compile

namespace {

using namespace int8compile;

void check_selfcheck() {
  const Kernels* right[] = {amx_kernels(), avx512vnni_kernels(), avxvnni_kernels(), portable_kernels()};
  for (const Kernels* use : right) {
    expect(agrees_with_portable(*use), "the self-check rejects ", use->name);
  }
  static Kernels wrong[8];
  static Packing packing = *amx_kernels()->multipliers[Method::amx].packing;
  for (Kernels& use : wrong) {
    use = *portable_kernels();
  }
  wrong[0].name = "sums";
  const Multiplier off_by_one = {[](Codes a, Codes b, int64_t rows, int64_t cols, int64_t k, int32_t* sums) {
    portable_kernels()->multipliers[Method::widened].multiply(a, b, rows, cols, k, sums);
    sums[(rows - 1) * kTileCols + cols - 1] += k > 1000;
  }};
  wrong[0].multipliers = Multipliers().with(Method::widened, off_by_one);
  wrong[1].name = "codes";
  wrong[1].quantize_row = [](const void* x, Float type, int64_t k, float limit, int8_t* codes, uint8_t* outliers) {
    const float scale = portable_kernels()->quantize_row(x, type, k, limit, codes, outliers);
    codes[k - 1] = int8_t(codes[k - 1] + (type == Float::f16));
    return scale;
  };
  wrong[2].name = "residual";
  wrong[2].residual_row = [](const void*, Float, const int8_t*, float, float, int64_t count, const int32_t*, float* to) {
    std::memset(to, 0, count * sizeof(float));
  };
  wrong[3].name = "outputs";
  wrong[3].finish = [](const Tile& tile) {
    portable_kernels()->finish(tile);
    *static_cast<uint8_t*>(tile.out) ^= tile.out_type == Float::bf16;
  };
  packing.pack = [](Codes a, int64_t rows, int64_t k, int8_t* packed) {
    amx_kernels()->multipliers[Method::amx].packing->pack({a.data, a.stride}, rows - (rows == 16), k, packed);
  };
  wrong[4] = *amx_kernels();
  wrong[4].name = "packed";
  wrong[4].multipliers.of[int(Method::amx)].packing = &packing;
  wrong[5].name = "seldom";  // which the plan takes for no call
  wrong[5].multipliers = wrong[5].multipliers.with(Method::panel, off_by_one);
  wrong[6].name = "widened";
  wrong[6].widen_row = [](const void* x, Float type, int64_t k, float* to) {
    portable_kernels()->widen_row(x, type, k, to);
    to[k - 1] += type == Float::bf16;
  };
  wrong[7].name = "floats";
  wrong[7].float_product = [](const FloatTile& tile) {
    FloatTile less = tile;
    less.k -= tile.k > 1000;
    portable_kernels()->float_product(less);
  };
  std::vector<Provider> table = {{"absent", nullptr, true}, {"not here", &wrong[0], false}};
  std::string names;
  for (const Kernels& use : wrong) {
    table.push_back({use.name, &use, true});
    names += (names.empty() ? "" : " ") + std::string(use.name);
  }
  table.push_back({"amx", amx_kernels(), true});
  table.push_back({"portable", portable_kernels(), true});
  Providers providers(table);
  expect(providers.rejected().empty(), "rejected before a check: ", providers.rejected());
  expect(providers.best() == amx_kernels(), "best is ", providers.best()->name);
  expect(providers.rejected() == names, "rejected are ", providers.rejected(), ", not ", names);
  expect(providers.named("sums") == nullptr && providers.named("absent") == nullptr, "a wrong provider can be had");
  expect(providers.named("portable") == portable_kernels(), "portable is not to be had");
  expect(providers.names() == "amx portable", "names are ", providers.names());
}

void check_all(const Kernels* use) {
  chosen = use;
  check_kernels(*use);
  check_extremes(*use);
  check_plan(*use);
  check_product(&chosen);
}

}  // namespace

int main(int count, char** words) {
  const std::string what = count > 1 ? words[1] : "";
  if (what == "selfcheck") {
    check_selfcheck();
  } else if (what == "features") {
    check_features();
  } else if (what == "here") {
    const std::string names = providers().names();
    expect(providers().rejected().empty(), "rejected: ", providers().rejected());
    for (const char* name : {"portable", "avx2", "avxvnni", "avx512vnni", "amx"}) {
      if (const Kernels* use = providers().named(name)) {
        check_all(use);
      }
    }
    const CpuFeatures& cpu = cpu_features();
    check_attention(*portable_attention());
    if (cpu.avx2) {
      check_attention(*avx2_attention());
    }
    if (cpu.avx512vnni) {
      check_attention(*avx512_attention());
    }
    if (cpu.avx512bf16) {
      check_attention(*avx512bf16_attention());
    }
    std::printf("%s\n", names.c_str());
  } else if (what == "attention" && count == 3) {
    const AttentionKernels* found = nullptr;
    for (const AttentionKernels* use : {portable_attention(), avx512_attention(), avx512bf16_attention()}) {
      found = std::string(use->name) == words[2] ? use : found;
    }
    expect(found != nullptr, "no attention ", words[2]);
    check_attention(*found);
  } else {
    expect(count == 3, "usage: check kernels|product|attention NAME, check here|features|selfcheck");
    const Kernels* table[] = {amx_kernels(), avx512vnni_kernels(), avxvnni_kernels(), portable_kernels()};
    for (const Kernels* use : table) {
      if (std::string(use->name) == words[2]) {
        chosen = use;
      }
    }
    expect(std::string(chosen->name) == words[2], "no provider ", words[2]);
    if (what == "kernels") {
      check_kernels(*chosen);
      check_extremes(*chosen);
      check_plan(*chosen);
    } else {
      check_product(&chosen);
    }
  }
  std::printf("right\n");
}
