// What attention's two products are made of: a form of numbers, and a block of rows times a packed panel.
//
// A form says how the operands of a product lie in scratch memory. Two have their own arithmetic: Widened multiplies
// floats, whatever the tensors' dtype; Pairs (attention_avx512bf16.cpp) bfloat16 numbers, two along the product's common
// dimension at a time. A step of the common dimension is a float or a pair: 32 bits, so that both are packed by
// transposing words.

#pragma once

#include <cstdint>
#include <cstring>

#include "attention.h"
#include "softmax.h"
#include "target.h"

namespace int8compile {
namespace {

inline int64_t round_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

template <class V>
struct Widened {
  using Vec = V;
  using Element = float;
  static constexpr int64_t pair = 1;

  static bool takes(Float) {
    return true;
  }

  static INT8COMPILE_INLINE void add_product(Vec& sum, const float* left, Vec right) {
    sum = sum.plus_product(Vec::all(*left), right);
  }

  static INT8COMPILE_INLINE Vec load(const float* from) {
    return Vec::load(from);
  }

  static INT8COMPILE_INLINE void store(Vec value, float* to) {
    value.store(to);
  }

  // `count` numbers from anywhere in a row, with zeros up to a multiple of a vector's width, to which `to` has room.
  template <class T>
  static void copy_row(const T* from, int64_t count, float* to) {
    for (int64_t at = 0; at < count; at += Vec::width) {
      load_some<Vec>(from + at, count - at).store(to + at);
    }
  }

  // Whether rows of that dtype are words already.
  static constexpr bool is_words(Float type) {
    return type == Float::f32;
  }

  // A row of values; `to` is that of a step.
  template <class T>
  static void pack_values(const T* from, int64_t /*stride*/, int64_t keys, int64_t count, float* to) {
    if (keys > 0) {
      copy_row(from, count, to);
    } else {
      std::memset(to, 0, round_up(count, Vec::width) * sizeof(float));
    }
  }
};

template <class Form>
struct Panels {
  using Vec = typename Form::Vec;
  using Element = typename Form::Element;

  // c [rows, cols] = alpha [rows] c + a [rows, steps] b [steps, cols], or the product alone where alpha is null; cols is
  // a multiple of a vector's width.
  struct Operands {
    const Element* a;
    int64_t a_stride;
    const Element* b;
    int64_t b_stride;
    int64_t steps, cols;
    const float* alpha;
    float* c;
    int64_t c_stride;
  };

  template <int rows, int vecs>
  __attribute__((noinline)) static void block(const Operands& o, int64_t col) {
    Vec acc[rows][vecs];
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        const Vec before = Vec::all(0.0f);
        acc[r][i] = before;
        if (o.alpha != nullptr) {
          acc[r][i] = Vec::load(o.c + r * o.c_stride + col + i * Vec::width) * Vec::all(o.alpha[r]);
        }
      }
    }
    const Element* a = o.a;
    const Element* b = o.b + col * Form::pair;
    for (int64_t step = 0; step < o.steps; ++step, a += Form::pair, b += o.b_stride) {
      Vec right[vecs];
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        right[i] = Form::load(b + i * Vec::width * Form::pair);
      }
      INT8COMPILE_UNROLL
      for (int r = 0; r < rows; ++r) {
        INT8COMPILE_UNROLL
        for (int i = 0; i < vecs; ++i) {
          Form::add_product(acc[r][i], a + r * o.a_stride, right[i]);
        }
      }
    }
    INT8COMPILE_UNROLL
    for (int r = 0; r < rows; ++r) {
      INT8COMPILE_UNROLL
      for (int i = 0; i < vecs; ++i) {
        acc[r][i].store(o.c + r * o.c_stride + col + i * Vec::width);
      }
    }
  }

  template <int rows>
  static void some_rows(const Operands& o) {
    for (int64_t col = 0; col < o.cols; col += Form::vecs * Vec::width) {
      const int64_t left = (o.cols - col) / Vec::width;
      if (left >= Form::vecs) {
        block<rows, Form::vecs>(o, col);
      } else if (left == 3) {
        block<rows, Form::vecs < 3 ? 1 : 3>(o, col);
      } else if (left == 2) {
        block<rows, Form::vecs < 2 ? 1 : 2>(o, col);
      } else {
        block<rows, 1>(o, col);
      }
    }
  }

  static void product(int rows, const Operands& o) {
    static_assert(Form::rows <= 6, "a case for each");
    switch (rows) {
      case 1:
        return some_rows<1>(o);
      case 2:
        return some_rows<2>(o);
      case 3:
        return some_rows<3>(o);
      case 4:
        return some_rows<4>(o);
      case 5:
        return some_rows<5>(o);
      default:
        return some_rows<Form::rows>(o);
    }
  }
};

}  // namespace
}  // namespace int8compile
