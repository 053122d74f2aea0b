#include "providers.h"

#include "cpu_features.h"
#include "selfcheck.h"

namespace int8compile {
namespace {

void append(std::string& names, const char* name) {
  names += (names.empty() ? "" : " ") + std::string(name);
}

}  // namespace

Providers::Providers(std::vector<Provider> table) {
  for (const Provider& provider : table) {
    const bool last = entries_.size() + 1 == table.size();
    entries_.push_back({provider, last, last});
  }
}

bool Providers::usable(Entry& entry) {
  if (entry.provider.kernels == nullptr || !entry.provider.runs) {
    return false;
  }
  if (!entry.checked) {
    entry.right = agrees_with_portable(*entry.provider.kernels);
    entry.checked = true;
  }
  return entry.right;
}

const Kernels* Providers::best() {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto entry = entries_.begin();
  while (!usable(*entry)) {
    ++entry;  // ends at the last
  }
  return entry->provider.kernels;
}

const Kernels* Providers::named(const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Entry& entry : entries_) {
    if (name == entry.provider.name && usable(entry)) {
      return entry.provider.kernels;
    }
  }
  return nullptr;
}

std::string Providers::names() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string names;
  for (Entry& entry : entries_) {
    if (usable(entry)) {
      append(names, entry.provider.name);
    }
  }
  return names;
}

std::string Providers::rejected() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::string names;
  for (const Entry& entry : entries_) {
    if (entry.checked && !entry.right) {
      append(names, entry.provider.name);
    }
  }
  return names;
}

Providers& providers() {
  static Providers here({
      {"amx", amx_kernels(), cpu_features().amx_int8},
      {"avx512vnni", avx512vnni_kernels(), cpu_features().avx512vnni},
      {"avxvnni", avxvnni_kernels(), cpu_features().avxvnni},
      {"avx2", avx2_kernels(), cpu_features().avx2},
      {"portable", portable_kernels(), true},
  });
  return here;
}

}  // namespace int8compile
