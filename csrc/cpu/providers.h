// The providers a CPU may choose among, and the choice: the best that runs here and passes its self-check.

#pragma once

#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"

namespace int8compile {

struct Provider {
  const char* name;
  const Kernels* kernels;  // null: not for this architecture, or not by this compiler
  bool runs;  // on this CPU, under this operating system
};

class Providers {
 public:
  // Best first. The last runs everywhere, and what it computes is right.
  explicit Providers(std::vector<Provider> table);

  const Kernels* best();

  // Null where there is none of that name, it does not run, or it was rejected.
  const Kernels* named(const std::string& name);

  // Names, best first, with spaces between them.
  std::string names();

  // The names of those that run here and computed something else than the portable provider, as far as checked.
  std::string rejected();

 private:
  struct Entry {
    Provider provider;
    bool checked, right;
  };

  bool usable(Entry& entry);

  std::mutex mutex_;
  std::vector<Entry> entries_;
};

// Those of this process.
Providers& providers();

}  // namespace int8compile
