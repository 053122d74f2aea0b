// What the checks share: random problems that come out the same each time, and memory that ends where it should.
//
// The programs are compiled twice: against this machine's instructions, for the providers that it has, and, with
// INT8COMPILE_EMULATED_ISA, against ../emulated_isa, for those that it may not have.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "../../../csrc/cpu/attention.h"
#include "../../../csrc/cpu/kernels.h"

#if defined(INT8COMPILE_EMULATED_ISA)
#include "tiles.h"
#endif

inline std::string text(const std::string& word) {
  return word;
}

inline std::string text(double number) {
  char word[32];
  std::snprintf(word, sizeof(word), "%.9g", number);
  return word;
}

template <class... Words>
void expect(bool condition, const Words&... otherwise) {
  if (!condition) {
    std::printf("wrong: %s\n", (text(otherwise) + ...).c_str());
    std::exit(1);
  }
}

class Random {
 public:
  int64_t below(int64_t limit) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return int64_t(state_ >> 33) % limit;
  }

  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(int64_t(values.size()))];
  }

  // About normally distributed.
  float normal() {
    float sum = -6;
    for (int i = 0; i < 12; ++i) {
      sum += float(below(1 << 20)) * 0x1p-20f;
    }
    return sum;
  }

 private:
  uint64_t state_ = 7;
};

// An array whose end the sanitizer watches. (A vector's capacity may be larger than its size.)
template <class T>
class Exact {
 public:
  explicit Exact(int64_t count) : size_(count), memory_(new T[count]) {}

  T* data() const {
    return memory_.get();
  }

  int64_t size() const {
    return size_;
  }

  T& operator[](int64_t i) const {
    return memory_[i];
  }

  T* begin() const {
    return data();
  }

  T* end() const {
    return data() + size_;
  }

 private:
  int64_t size_;
  std::unique_ptr<T[]> memory_;
};

inline int64_t bytes_of(int8compile::Float type) {
  return type == int8compile::Float::f32 ? 4 : 2;
}

// Whether a thread has left AMX's tiles as it found them; a real CPU is not asked.
inline bool tiles_are_released() {
#if defined(INT8COMPILE_EMULATED_ISA)
  return !emulated::tiles().configured;
#else
  return true;
#endif
}

// `count` floats of a dtype: normal ones, some large, and one of `odd` here and there.
Exact<char> floats(Random& random, int8compile::Float type, int64_t count, const std::vector<float>& odd);

void check_kernels(const int8compile::Kernels& use);

void check_extremes(const int8compile::Kernels& use);

void check_features();

void check_plan(const int8compile::Kernels& use);
void check_attention(const int8compile::AttentionKernels& use);

// `use` is what int8compile::kernels() returns.
void check_product(const int8compile::Kernels** use);
