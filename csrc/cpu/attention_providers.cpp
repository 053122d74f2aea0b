// Tests restrict the choice with int8compile_native::set_attention(name), and by set_isa() as that of int8 kernels;
// "auto" goes back.

#include "attention_providers.h"

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <string>

#include "attention_check.h"
#include "cpu_features.h"

namespace int8compile {
namespace {

// Instruction sets, as far as attention tells them apart.
enum Level { kAnyCpu, kAvx2, kAvx512 };

Level level_of(const Kernels& provider) {
  const auto is = [&](const char* name) { return std::strcmp(provider.name, name) == 0; };
  return is("portable") ? kAnyCpu : is("avx2") || is("avxvnni") ? kAvx2 : kAvx512;
}

struct Entry {
  const AttentionKernels* kernels;
  Level level;
  bool usable;
  bool wanted;  // unless it is asked for
};

// A dot product of pairs takes as long as four products of floats on an Emerald Rapids, where it was timed.
bool pairs_are_fast() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

// Best first; the last runs everywhere and takes every dtype.
const Entry (&entries())[4] {
  const auto usable = [](const AttentionKernels* kernels, bool runs) {
    return kernels != nullptr && runs && agrees_with_portable(*kernels);
  };
  static const CpuFeatures& cpu = cpu_features();
  static const Entry table[4] = {
      {avx512bf16_attention(), kAvx512, usable(avx512bf16_attention(), cpu.avx512bf16), pairs_are_fast()},
      {avx512_attention(), kAvx512, usable(avx512_attention(), cpu.avx512vnni), true},
      {avx2_attention(), kAvx2, usable(avx2_attention(), cpu.avx2), true},
      {portable_attention(), kAnyCpu, true, true},
  };
  return table;
}

std::atomic<const AttentionKernels*>& asked() {
  static std::atomic<const AttentionKernels*> kernels{nullptr};
  return kernels;
}

std::string attentions() {
  std::string names;
  for (const Entry& entry : entries()) {
    if (entry.usable) {
      names += (names.empty() ? "" : " ") + std::string(entry.kernels->name);
    }
  }
  return names;
}

void set_attention(const std::string name) {
  const AttentionKernels* found = nullptr;
  for (const Entry& entry : entries()) {
    if (entry.usable && name == entry.kernels->name) {
      found = entry.kernels;
    }
  }
  TORCH_CHECK_VALUE(
      found != nullptr || name == "auto", "int8compile_native::set_attention: name is '", name, "'; this CPU has: auto ",
      attentions());
  asked() = found;
}

std::string attention(at::ScalarType dtype) {
  return attention_kernels(dtype == at::kBFloat16 ? Float::bf16 : dtype == at::kHalf ? Float::f16 : Float::f32).name;
}

}  // namespace

const AttentionKernels& attention_kernels(Float type) {
  const AttentionKernels* wanted = asked().load(std::memory_order_relaxed);
  if (wanted != nullptr && wanted->takes(type)) {
    return *wanted;
  }
  const Level most = level_of(kernels());
  for (const Entry& entry : entries()) {
    if (entry.usable && entry.wanted && entry.level <= most && entry.kernels->takes(type)) {
      return *entry.kernels;
    }
  }
  return *portable_attention();
}

}  // namespace int8compile

TORCH_LIBRARY_FRAGMENT(int8compile_native, m) {
  m.def("set_attention(str name) -> ()", &int8compile::set_attention);
  m.def("attention(ScalarType dtype) -> str", &int8compile::attention);
  m.def("attentions() -> str", &int8compile::attentions);
}
