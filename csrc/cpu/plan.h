// Which of a provider's methods multiplies: the table of plan.cpp, unless a method is forced or a tuned table knows
// better. Sizes and threads decide, never values, and the choice changes no number: all methods' sums are the same.

#pragma once

#include <string>

#include "kernels.h"

namespace int8compile {

// The method for a call. Throws std::invalid_argument for a forced one that the provider cannot use for it.
Method plan(const Kernels& use, const Sizes& sizes);

// "dot", "panel", ...
const char* name_of(Method method);

// The names of a provider's methods with spaces between them.
std::string methods_of(const Kernels& use);

// One method for all calls, for tests and for timing; "auto" goes back. Throws std::invalid_argument for another name.
void force_method(const std::string& name);

// What `int8compile tune` found, for calls of one provider: lines of "threads rows k cols method". An entry holds for
// the calls on as many threads whose cols and k are in the same half octaves as its own, and whose rows in the same
// octave, from 512 on in any. Replaces what was set before; empty: nothing is tuned. Throws std::invalid_argument for a line that is none.
void set_tuned(const Kernels& use, const std::string& table);

// The half octave that a size is in: 2 for 2, 3 for 3, 4 for 4 and 5, 5 for 6 and 7, 6 for 8 to 11, ...
int step_of(int64_t size);

// The table: one function a provider.
Method portable_method(const Sizes& sizes);
Method avx2_method(const Sizes& sizes);
Method avxvnni_method(const Sizes& sizes);
Method avx512vnni_method(const Sizes& sizes);
Method amx_method(const Sizes& sizes);

}  // namespace int8compile
