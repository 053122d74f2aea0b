// The provider in use: the best of providers.cpp, or the one that set_isa() asked for.
//
// Tests restrict the choice with int8compile_native::set_isa(name); "auto" goes back. The Python side reads any
// environment variable, once; nothing here does.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <string>

#include "kernels.h"
#include "providers.h"

namespace int8compile {
namespace {

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{providers().best()};
  return kernels;
}

std::string isa() {
  return kernels().name;
}

std::string isas() {
  return providers().names();
}

std::string rejected() {
  return providers().rejected();
}

void set_isa(const std::string name) {
  const Kernels* asked = name == "auto" ? providers().best() : providers().named(name);
  TORCH_CHECK_VALUE(
      asked != nullptr, "int8compile_native::set_isa: name is '", name, "'; this CPU has: auto ", isas(),
      rejected().empty() ? "" : "; rejected, since they compute wrong numbers here: ", rejected());
  chosen() = asked;
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
  m.def("rejected() -> str", &int8compile::rejected);
}
