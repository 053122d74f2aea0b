// The provider in use: the best of providers.cpp, or the one that set_isa() asked for. And its methods: plan.cpp.
//
// Tests restrict the choice with int8compile_native::set_isa(name) and force_cpu_kernel(name); "auto" goes back. The
// Python side reads any environment variable, and the file of a tuned table, once; nothing here does.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <atomic>
#include <string>

#include "kernels.h"
#include "plan.h"
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

std::string cpu_kernels() {
  return methods_of(kernels());
}

std::string cpu_kernel(int64_t rows, int64_t cols, int64_t k, int64_t threads) {
  return name_of(plan(kernels(), {rows, cols, k, int(threads)}));
}

void force_cpu_kernel(const std::string name) {
  force_method(name);
}

void set_tuned_kernels(const std::string table) {
  set_tuned(kernels(), table);
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
  m.def("cpu_kernels() -> str", &int8compile::cpu_kernels);
  m.def("cpu_kernel(int rows, int cols, int k, int threads) -> str", &int8compile::cpu_kernel);
  m.def("force_cpu_kernel(str name) -> ()", &int8compile::force_cpu_kernel);
  m.def("set_tuned_kernels(str table) -> ()", &int8compile::set_tuned_kernels);
}
