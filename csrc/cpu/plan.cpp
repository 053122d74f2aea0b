// The table of methods. They differ in what they do before they multiply, and so in the rows that pay for it:
//
//   method   of                rows     why
//   widened  portable, avx2    any      int16 products; their only one (widened.h)
//   dot      all with VNNI     few      dot products along K, straight from the weight (vnni.h): nothing to prepare, and
//                                       the weight comes from memory no faster
//   panel    avx512vnni        64..     packs the weight, 48 columns at a time, and has no horizontal sums (panel.h);
//                              32..     where K is so deep that dot has to add up several pieces of it
//            avxvnni           24..     the same, 24 columns at a time; where K is so small that dot's horizontal sums tell
//                              128..    for any K
//   amx      amx               5..      packs the activation (amx.cpp); K of a fragment at least
//
// What was measured: avx512vnni on an Emerald Rapids, shapes of 576x576 to 4096x11008. On one thread and on two the panel
// was 0.7 to 1.0 times as fast as dot at 16 rows, 0.8 to 1.1 at 32, 0.95 to 1.2 at 64 and 1.0 to 1.4 at 128; on one alone,
// since its row sums come with the call, 0.93 to 1.1 at 48. 11008x4096 takes it 1.1 to 1.3 times as fast at 32 already. The
// same CPU held to avxvnni: K = 576 1.1 at 24 rows and 1.3 from 64, K = 2048 0.85 to 1.0 at 32 and 1.1 at 512, K = 4096
// 0.95 to 1.1 from 64. The rows of amx are an estimate. `int8compile tune` measures on the machine at hand.

#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace int8compile {

Method portable_method(const Sizes&) {
  return Method::widened;
}

Method avx2_method(const Sizes&) {
  return Method::widened;
}

Method avxvnni_method(const Sizes& sizes) {
  return sizes.rows >= (sizes.k <= 1024 ? 24 : 128) ? Method::panel : Method::dot;
}

Method avx512vnni_method(const Sizes& sizes) {
  return sizes.rows >= (sizes.k >= 10240 ? 32 : 64) ? Method::panel : Method::dot;
}

Method amx_method(const Sizes& sizes) {
  return sizes.rows >= 5 && sizes.k >= 64 ? Method::amx : Method::dot;
}

namespace {

constexpr const char* kNames[kMethods] = {"widened", "dot", "panel", "amx"};
constexpr int kNoMethod = -1;
constexpr int kLastStepOfRows = 18;  // 512 and more

std::atomic<int> forced{kNoMethod};

int find(const std::string& name) {
  for (int i = 0; i < kMethods; ++i) {
    if (name == kNames[i]) {
      return i;
    }
  }
  return kNoMethod;
}

// What a tuned entry is looked up by: four numbers in one. Rows go by octaves.
uint64_t key_of(const Sizes& sizes) {
  const uint64_t rows = uint64_t(std::min(step_of(sizes.rows), kLastStepOfRows)) / 2;
  return uint64_t(sizes.threads) << 32 | rows << 16 | uint64_t(step_of(sizes.k)) << 8 | uint64_t(step_of(sizes.cols));
}

struct Entry {
  uint64_t key;
  Method method;
};

struct Tuned {
  const Kernels* use;
  std::vector<Entry> entries;  // by key

  int find(uint64_t key) const {
    const auto at = std::lower_bound(
        entries.begin(), entries.end(), key, [](const Entry& entry, uint64_t wanted) { return entry.key < wanted; });
    return at == entries.end() || at->key != key ? kNoMethod : int(at->method);
  }
};

// Never freed, since a call may be reading it; there is one a process, or a few in tests.
std::atomic<const Tuned*> tuned{nullptr};

Entry entry_of(const Kernels& use, const std::string& line) {
  std::istringstream words(line);
  Sizes sizes;
  std::string name, more;
  if (!(words >> sizes.threads >> sizes.rows >> sizes.k >> sizes.cols >> name) || words >> more) {
    throw std::invalid_argument("expected 'threads rows k cols method', not '" + line + "'");
  }
  const int method = find(name);
  if (std::min<int64_t>({sizes.threads, sizes.rows, sizes.k, sizes.cols}) < 1 || method == kNoMethod ||
      !use.multipliers.can(Method(method), sizes.k)) {
    throw std::invalid_argument(
        "'" + line + "': sizes are at least 1, and " + use.name + " has the methods " + methods_of(use));
  }
  return {key_of(sizes), Method(method)};
}

[[noreturn]] void refuse(const Kernels& use, const Sizes& sizes, Method method) {
  throw std::invalid_argument(
      std::string("kernel '") + name_of(method) + "' was asked for, which cannot multiply [" +
      std::to_string(sizes.rows) + ", " + std::to_string(sizes.k) + "] by [" + std::to_string(sizes.cols) + ", " +
      std::to_string(sizes.k) + "] with " + use.name + ", whose kernels are " + methods_of(use));
}

}  // namespace

int step_of(int64_t size) {
  if (size < 2) {
    return 0;
  }
  const int octave = 63 - __builtin_clzll(uint64_t(size));
  return 2 * octave + int(size >> (octave - 1) & 1);
}

Method plan(const Kernels& use, const Sizes& sizes) {
  const int asked = forced.load(std::memory_order_relaxed);
  if (asked != kNoMethod) {
    if (!use.multipliers.can(Method(asked), sizes.k)) {
      refuse(use, sizes, Method(asked));
    }
    return Method(asked);
  }
  const Tuned* table = tuned.load(std::memory_order_acquire);
  if (table != nullptr && table->use == &use) {
    const int found = table->find(key_of(sizes));
    if (found != kNoMethod && use.multipliers.can(Method(found), sizes.k)) {
      return Method(found);
    }
  }
  return use.method(sizes);
}

const char* name_of(Method method) {
  return kNames[int(method)];
}

std::string methods_of(const Kernels& use) {
  std::string names;
  for (int i = 0; i < kMethods; ++i) {
    if (use.multipliers.of[i].multiply != nullptr) {
      names += (names.empty() ? "" : " ") + std::string(kNames[i]);
    }
  }
  return names;
}

void force_method(const std::string& name) {
  const int method = find(name);
  if (method == kNoMethod && name != "auto") {
    throw std::invalid_argument("no kernel for CPUs is named '" + name + "'");
  }
  forced = method;
}

void set_tuned(const Kernels& use, const std::string& table) {
  std::vector<Entry> entries;
  std::istringstream lines(table);
  for (std::string line; std::getline(lines, line);) {
    entries.push_back(entry_of(use, line));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) { return a.key < b.key; });
  tuned = entries.empty() ? nullptr : new Tuned{&use, std::move(entries)};
}

}  // namespace int8compile
