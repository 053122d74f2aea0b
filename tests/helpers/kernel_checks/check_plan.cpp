// The table of methods, and what takes its place: forced ones and a tuned table.

#include <stdexcept>
#include <string>

#include "../../../csrc/cpu/plan.h"
#include "check.h"

using namespace int8compile;

namespace {

std::string planned(const Kernels& use, int64_t rows, int64_t cols, int64_t k, int threads) {
  return name_of(plan(use, {rows, cols, k, threads}));
}

template <class Call>
std::string refusal(Call call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "";
}

void expect_refusal(const std::string& said, const std::string& wanted) {
  expect(said.find(wanted) != std::string::npos, "a refusal says '", said, "', not '", wanted, "'");
}

// Whatever the sizes, the table names a method that the provider has and that can compute them.
void check_defaults(const Kernels& use) {
  for (const int64_t k : {0, 1, 63, 64, 65, 576, 4096, 131072}) {
    for (const int64_t rows : {0, 1, 2, 4, 5, 16, 127, 128, 192, 512, 100000}) {
      for (const int threads : {1, 2, 64}) {
        for (const int64_t cols : {0, 1, 16, 4096, 200000}) {
          const Method method = plan(use, {rows, cols, k, threads});
          expect(use.multipliers.can(method, k), use.name, " takes ", name_of(method), " for rows ", rows, ", k ", k);
        }
      }
    }
  }
}

void check_forced(const Kernels& use) {
  for (int i = 0; i < kMethods; ++i) {
    const std::string name = name_of(Method(i));
    force_method(name);
    for (const int64_t k : {1, 64, 4096}) {
      if (use.multipliers.can(Method(i), k)) {
        expect(planned(use, 7, 16, k, 1) == name, name, " was forced for ", use.name);
      } else {
        expect_refusal(
            refusal([&] { plan(use, {7, 16, k, 1}); }),
            "kernel '" + name + "' was asked for, which cannot multiply [7, " + std::to_string(k) + "] by [16, ");
      }
    }
  }
  expect_refusal(refusal([] { force_method("fastest"); }), "no kernel for CPUs is named 'fastest'");
  force_method("auto");
  expect(planned(use, 7, 16, 64, 1) == name_of(use.method({7, 16, 64, 1})), "'auto' does not go back");
}

void check_tuned() {
  // The portable provider with a second method, which its table takes for no call.
  static Kernels use = *portable_kernels();
  use.multipliers = use.multipliers.with(Method::panel, use.multipliers[Method::widened]);
  const Kernels other = use;
  set_tuned(use, "2 16 576 1536 panel\n2 512 576 1536 panel\n1 1 4096 4096 panel");
  const struct {
    int64_t rows, cols, k;
    int threads;
    bool found;
  } calls[] = {
      {16, 1536, 576, 2, true},     {16, 1536, 576, 1, false},    {16, 1536, 576, 3, false},
      {31, 1536, 576, 2, true},     {32, 1536, 576, 2, false},    {15, 1536, 576, 2, false},
      {16, 2047, 767, 2, true},     {16, 2048, 576, 2, false},    {16, 1535, 576, 2, false},
      {16, 1536, 768, 2, false},    {16, 1536, 511, 2, false},    {16, 1536, 512, 2, true},
      {511, 1536, 576, 2, false},   {512, 1536, 576, 2, true},    {100000, 1536, 576, 2, true},
      {1, 4096, 4096, 1, true},     {2, 4096, 4096, 1, false},    {1, 0, 0, 1, false},
  };
  for (const auto& call : calls) {
    const std::string name = planned(use, call.rows, call.cols, call.k, call.threads);
    expect((name == "panel") == call.found, "tuned: ", call.rows, " x ", call.k, " x ", call.cols, " takes ", name);
  }
  expect(planned(other, 16, 1536, 576, 2) == "widened", "another provider takes the tuned table");
  for (const char* line : {"", "2 16 576 1536", "2 16 576 1536 panel panel", "2 16 576 1536 dot", "2 16 576 1536 best",
                           "0 16 576 1536 panel", "2 16 -576 1536 panel", "2 1e9 576 1536 panel",
                           "2 99999999999999999999 576 1536 panel", "2 16 576 x panel"}) {
    const std::string table = "2 16 576 1536 panel\n" + std::string(line) + "\n";
    expect(!refusal([&] { set_tuned(use, table); }).empty(), "a tuned table may have the line '", line, "'");
  }
  expect(planned(use, 16, 1536, 576, 2) == "panel", "a table that was refused took another's place");
  force_method("widened");
  expect(planned(use, 16, 1536, 576, 2) == "widened", "a tuned table goes before what is forced");
  force_method("auto");
  set_tuned(use, "");
  expect(planned(use, 16, 1536, 576, 2) == "widened", "an empty table is not empty");
}

void check_steps() {
  int last = 0;
  for (int64_t size = 2; size < 5000; ++size) {
    const int step = step_of(size);
    expect(step == last || step == last + 1 || size == 2, "step of ", size, " is ", step);
    expect((step != last) == (size == 2 || size == 3 || (size & (size - 1)) == 0 ||
               (size % 3 == 0 && (size / 3 & (size / 3 - 1)) == 0)),
           "step ", step, " begins at ", size);
    last = step;
  }
  expect(step_of(INT64_MAX) == 125, "the last step is ", step_of(INT64_MAX));
}

}  // namespace

void check_plan(const Kernels& use) {
  check_steps();
  check_defaults(use);
  check_forced(use);
  check_tuned();
}
