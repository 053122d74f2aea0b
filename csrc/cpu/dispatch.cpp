// Chooses a provider: the first of the table, best first, that this CPU runs and that has been proven.
//
// Tests restrict the choice with int8compile_native::set_isa(name); "auto" goes back. The Python side reads any
// environment variable, once; nothing here does. AMX goes at the top of the table.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <string>

#include "cpu_features.h"
#include "kernels.h"

namespace int8compile {
namespace {

struct Provider {
  const char* name;
  const Kernels* kernels;  // null: not for this architecture
  bool runs;
  bool proven;  // run on such a CPU and found right; others are taken only when asked for by name
};

const Provider* providers() {
  static const Provider table[] = {
      {"avx512vnni", avx512vnni_kernels(), cpu_features().avx512vnni, false},
      {"avx2", avx2_kernels(), cpu_features().avx2, true},
      {"portable", portable_kernels(), true, true},
      {nullptr, nullptr, false, false},
  };
  return table;
}

bool usable(const Provider& provider) {
  return provider.kernels != nullptr && provider.runs;
}

const Kernels* best() {
  const Provider* provider = providers();
  while (!usable(*provider) || !provider->proven) {
    ++provider;  // ends at portable
  }
  return provider->kernels;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{best()};
  return kernels;
}

std::string isa() {
  return kernels().name;
}

std::string isas() {
  std::string names;
  for (const Provider* provider = providers(); provider->name != nullptr; ++provider) {
    if (usable(*provider)) {
      names += (names.empty() ? "" : " ") + std::string(provider->name);
    }
  }
  return names;
}

void set_isa(const std::string name) {
  if (name == "auto") {
    chosen() = best();
    return;
  }
  for (const Provider* provider = providers(); provider->name != nullptr; ++provider) {
    if (name == provider->name && usable(*provider)) {
      chosen() = provider->kernels;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "int8compile_native::set_isa: name is '", name, "'; this CPU has: auto ", isas());
}

}  // namespace

const Kernels& kernels() {
  return *chosen().load(std::memory_order_relaxed);
}

}  // namespace int8compile

TORCH_LIBRARY_FRAGMENT(int8compile_native, m) {
  m.def("set_isa(str name) -> ()", &int8compile::set_isa);
  m.def("isa() -> str", &int8compile::isa);
  m.def("isas() -> str", &int8compile::isas);
}
