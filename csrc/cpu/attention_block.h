// One block of queries, all heads of a group together, against every key it sees: products, softmax, output.
//
// The rows of a block are the queries of one head after those of another. For kKeyBlock keys at a time, keys (their
// transpose) and values are packed once for all rows; then a few rows at a time are multiplied with the keys, get their
// weights, and add them times the values to their outputs. (Where there are few rows in all, nothing is packed.) A row keeps its largest score so far; where that grows, what
// was summed up before is scaled down (Milakov and Gimelshein, 2018; Dao et al., 2022).
//
// What a mask hides is left out where that changes nothing (attention_sight.h).

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "attention.h"
#include "attention_few.h"
#include "attention_mask.h"
#include "attention_product.h"
#include "attention_sight.h"
#include "softmax.h"

namespace int8compile {
namespace {

template <class Form>
class Block : Sight<typename Form::Vec> {
 public:
  using Vec = typename Form::Vec;
  using Element = typename Form::Element;
  static constexpr int64_t width = Vec::width;
  // Rows whose softmax is taken at a time: enough to work on one while another waits, few enough to stay in L1.
  static constexpr int kRows = (3 * Form::rows >= kFewRows ? 3 : kFewRows / Form::rows) * Form::rows;

  explicit Block(const QueryBlock& block) : Sight<Vec>(block) {
    lay_out(static_cast<char*>(block.scratch));
  }

  static int64_t scratch_bytes(const Attention& call, int64_t count) {
    const QueryBlock block = {&call, 0, 0, 0, count, nullptr, call.heads, 0, nullptr};
    return Block(block).bytes_;
  }

  static void attend(const QueryBlock& block) {
    Block(block).run();
  }

 private:
  using Base = Sight<Vec>;
  using typename Base::See;
  using Base::block_, Base::call_, Base::rows_, Base::query_magnitude_, Base::largest_, Base::mask_, Base::visible_;
  using Base::visible_keys;

  int64_t steps_, query_stride_, value_stride_, bytes_ = 0;
  Element *queries_, *keys_, *values_, *weights_;
  float* total_;  // [rows][width], a row's sum in parts
  float *out_, *scores_;

  template <class T>
  void take(char* memory, T*& array, int64_t count) {
    array = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes_));
    bytes_ += round_up(count * int64_t(sizeof(T)), 64);
  }

  void lay_out(char* memory) {
    steps_ = (call_.width + Form::pair - 1) / Form::pair;
    query_stride_ = round_up(call_.width, width * Form::pair);
    value_stride_ = round_up(call_.value_width, width);
    take(memory, queries_, rows_ * query_stride_);
    take(memory, keys_, round_up(steps_, width) * kKeyBlock * Form::pair);
    take(memory, values_, kKeyBlock * value_stride_);
    take(memory, weights_, kRows * kKeyBlock);
    take(memory, out_, rows_ * value_stride_);
    take(memory, largest_, rows_ + width);
    take(memory, total_, rows_ * width);
    take(memory, mask_, this->mask_rows() * kKeyBlock);
    take(memory, scores_, kRows * kKeyBlock);
    take(memory, visible_, this->mask_rows());
  }

  void run() {
    if constexpr (Form::pair > 1) {
      run_as<Element>();
    } else {
      with_type(call_.type, [&](auto sample) { run_as<decltype(sample)>(); });
    }
  }

  template <class T>
  void run_as() {
    pack_queries<T>();
    std::memset(out_, 0, rows_ * value_stride_ * sizeof(float));
    std::memset(total_, 0, rows_ * width * sizeof(float));
    for (int64_t row = 0; row < rows_ + width; ++row) {
      largest_[row] = kMinusInfinity;
    }
    for (int64_t key = 0; key < call_.keys; key += kKeyBlock) {
      const int64_t here = call_.keys - key < kKeyBlock ? call_.keys - key : kKeyBlock;
      const See see = this->template seen<T>(key, here);
      if (see == See::nothing) {
        continue;
      }
      const T* keys = row_of<T>(call_.key, block_.batch, block_.kv_head, key);
      const T* values = row_of<T>(call_.value, block_.batch, block_.kv_head, key);
      if constexpr (Form::pair == 1) {
        if (call_.has_few_rows()) {
          attend_few(keys, values, here, see);
          continue;
        }
      }
      pack_keys(keys, here);
      pack_values(values, here);
      for (int64_t row = 0; row < rows_; row += kRows) {
        attend_rows(row, int(rows_ - row < kRows ? rows_ - row : kRows), see);
      }
    }
    write<T>();
  }

  template <class T>
  void pack_queries() {
    for (int64_t head = 0; head < call_.group(); ++head) {
      const T* from = row_of<T>(call_.query, block_.batch, block_.kv_head * call_.group() + head, block_.first);
      Element* to = queries_ + head * block_.count * query_stride_;
      for (int64_t i = 0; i < block_.count; ++i) {
        Form::copy_row(from + i * call_.query.row, call_.width, to + i * query_stride_);
      }
      if (call_.mask_type != MaskType::none) {
        const float most = magnitude_of<Vec>(from, call_.query.row, block_.count, call_.width);
        query_magnitude_ = most > query_magnitude_ ? most : query_magnitude_;
      }
    }
  }

  // [steps][kKeyBlock] words. Columns behind the last key repeat it, so that they bring no NaN that is not there.
  template <class T>
  void pack_keys(const T* from, int64_t count) {
    constexpr int64_t word = Form::pair;
    const int64_t stride = call_.key.row;
    for (int64_t column = 0; column < kKeyBlock; column += width) {
      if (column >= round_up(count, width)) {
        break;
      }
      for (int64_t step = 0; step < steps_; step += width) {
        Element* to = keys_ + (step * kKeyBlock + column) * word;
        if (Form::is_words(call_.type) && column + width <= count && (step + width) * word <= call_.width) {
          Form::transpose(from + column * stride + step * word, stride * int64_t(sizeof(T)), to, kKeyBlock * 4);
          continue;
        }
        alignas(64) Element words[width][width * word] = {};
        const int64_t deep = call_.width - step * word, here = deep < width * word ? deep : width * word;
        for (int64_t i = 0; i < width; ++i) {
          const int64_t key = column + i < count ? column + i : count - 1;
          Form::copy_row(from + key * stride + step * word, here, words[i]);
        }
        Form::transpose(words, sizeof(words[0]), to, kKeyBlock * 4);
      }
    }
  }

  template <class T>
  void pack_values(const T* from, int64_t count) {
    const int64_t stride = call_.value.row;
    for (int64_t key = 0; key < kKeyBlock; key += Form::pair) {
      const int64_t left = count - key < 0 ? 0 : count - key;
      Form::pack_values(from + key * stride, stride, left, call_.value_width, values_ + key * value_stride_);
    }
  }

  // Up to kRows rows on their way through a block of keys.
  struct Rows {
    int64_t first;
    int count;
    const float* masks[kRows];
    int64_t keys[kRows];  // that Form::rows of them see, at the first of these
    alignas(64) float alpha[kRows + width];  // what their sums so far are scaled by
  };

  Rows rows_from(int64_t first, int count, See see) const {
    Rows rows = {first, count, {}, {}, {}};
    for (int r = 0; r < count; r += Form::rows) {
      rows.keys[r] = visible_keys(first + r, in_product(rows, r), see, rows.masks + r);
    }
    return rows;
  }

  // Of the rows from r on, those that are multiplied together.
  static int in_product(const Rows& rows, int r) {
    return rows.count - r < Form::rows ? rows.count - r : Form::rows;
  }

  // Scores, what becomes of the sums so far, weights, and the values.
  void attend_rows(int64_t first, int count, See see) {
    Rows rows = rows_from(first, count, see);
    for (int r = 0; r < count; r += Form::rows) {
      Panels<Form>::product(
          in_product(rows, r), {queries_ + (first + r) * query_stride_, query_stride_, keys_, kKeyBlock * Form::pair,
                                steps_, rows.keys[r], nullptr, scores_ + r * kKeyBlock, kKeyBlock});
    }
    weigh_rows(rows, see);
    for (int r = 0; r < count; r += Form::rows) {
      if (rows.keys[r] > 0) {
        Panels<Form>::product(
            in_product(rows, r),
            {weights_ + r * kKeyBlock, kKeyBlock, values_, value_stride_ * Form::pair, rows.keys[r] / Form::pair,
             value_stride_, rows.alpha + r, out_ + (first + r) * value_stride_, value_stride_});
      }
    }
  }

  // The same for all rows of the call, with `count` keys and values where they lie.
  template <class T>
  void attend_few(const T* keys, const T* values, int64_t count, See see) {
    static_assert(kFewRows <= kRows, "all at a time");
    Rows rows = rows_from(0, int(rows_), see);
    const auto seen = [&](int r) { return rows.keys[r] < count ? rows.keys[r] : count; };
    for (int r = 0; r < rows.count; r += Form::rows) {
      float* scores = scores_ + r * kKeyBlock;
      Few<Vec, T>::scores(
          in_product(rows, r), {queries_ + r * query_stride_, query_stride_, keys, call_.key.row, seen(r), call_.width,
                                scores, kKeyBlock});
      for (int64_t i = 0; i < in_product(rows, r); ++i) {  // hidden by the mask
        for (int64_t key = seen(r); key < rows.keys[r]; ++key) {
          scores[i * kKeyBlock + key] = 0;
        }
      }
    }
    weigh_rows(rows, see);
    for (int r = 0; r < rows.count; r += Form::rows) {
      if (rows.keys[r] > 0) {
        Few<Vec, T>::add_values(
            in_product(rows, r),
            {weights_ + r * kKeyBlock, kKeyBlock, values, call_.value.row, seen(r), call_.value_width,
             out_ + r * value_stride_, value_stride_},
            rows.alpha + r);
      }
    }
  }

  // Scores to weights; rows.alpha by how much the largest score has grown.
  void weigh_rows(Rows& rows, See see) {
    alignas(64) float most[kRows + width], base[kRows + width];
    for (int r = 0; r < rows.count + width; ++r) {
      most[r] = kMinusInfinity;
    }
    const auto keys = [&](int r) { return rows.keys[r / Form::rows * Form::rows]; };
    for (int r = 0; r < rows.count; ++r) {
      most[r] = finish_scores(see, scores_ + r * kKeyBlock, rows.masks[r], keys(r));
    }
    for (int r = 0; r < rows.count; r += width) {  // lanes behind the last row are other rows', and stay as they are
      const Vec before = Vec::load(largest_ + rows.first + r), now = Vec::larger(Vec::load(most + r), before);
      const Vec subtracted = Vec::larger(now, Vec::all(-kLargestFloat));  // from -inf, -inf could not be
      now.store(largest_ + rows.first + r);
      subtracted.store(base + r);
      exp_of(before - subtracted).store(rows.alpha + r);
    }
    for (int r = 0; r < rows.count; ++r) {
      weigh(
          scores_ + r * kKeyBlock, base[r], rows.alpha[r], keys(r), weights_ + r * kKeyBlock,
          total_ + (rows.first + r) * width);
    }
  }

  // body(at) for each vector of a row, without a loop where the block is whole.
  template <class Body>
  static INT8COMPILE_INLINE void each_vector(int64_t keys, Body body) {
    if (keys == kKeyBlock) {
      INT8COMPILE_UNROLL
      for (int64_t at = 0; at < kKeyBlock; at += width) {
        body(at);
      }
    } else {
      for (int64_t at = 0; at < keys; at += width) {
        body(at);
      }
    }
  }

  // Products to scores; returns the largest.
  INT8COMPILE_INLINE float finish_scores(See see, float* scores, const float* mask, int64_t keys) const {
    const Vec scale = Vec::all(call_.scale);
    Vec largest = Vec::all(kMinusInfinity);
    const auto put = [&](int64_t at, Vec score) INT8COMPILE_INLINE_LAMBDA {
      score.store(scores + at);
      largest = Vec::larger(score, largest);
    };
    switch (see) {
      case See::added:
        each_vector(keys, [&](int64_t at) INT8COMPILE_INLINE_LAMBDA {
          put(at, Vec::load(mask + at).plus_product(Vec::load(scores + at), scale));
        });
        break;
      case See::up_to:
        each_vector(keys, [&](int64_t at) INT8COMPILE_INLINE_LAMBDA {
          put(at, Vec::smaller(Vec::load(scores + at) * scale, Vec::load(mask + at)));
        });
        break;
      default:
        each_vector(keys, [&](int64_t at) INT8COMPILE_INLINE_LAMBDA { put(at, Vec::load(scores + at) * scale); });
    }
    return largest.largest();
  }

  // Scores to weights, and their sum to `total`, in as many parts as there are lanes.
  static INT8COMPILE_INLINE void weigh(
      const float* scores, float base, float alpha, int64_t keys, Element* weights, float* total) {
    Vec sum = Vec::all(0.0f);
    each_vector(keys, [&](int64_t at) INT8COMPILE_INLINE_LAMBDA {
      const Vec weight = exp_of(Vec::load(scores + at) - Vec::all(base));
      sum = sum + weight;
      Form::store(weight, weights + at);
    });
    sum.plus_product(Vec::load(total), Vec::all(alpha)).store(total);
  }

  template <class T>
  void write() const {
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t head = block_.kv_head * call_.group() + row / block_.count;
      T* to = const_cast<T*>(row_of<T>(call_.out, block_.batch, head, block_.first + row % block_.count));
      // Where every key is hidden the total is 0, and so is the output.
      const float total = Vec::load(total_ + row * width).total();
      const Vec factor = Vec::all(total == 0 ? 1.0f : 1.0f / total);
      const float* from = out_ + row * value_stride_;
      for (int64_t at = 0; at < call_.value_width; at += width) {
        const Vec value = Vec::load(from + at) * factor;
        if (at + width <= call_.value_width) {
          value.store(to + at);
        } else {
          T padded[width];
          value.store(padded);
          std::memcpy(to + at, padded, (call_.value_width - at) * sizeof(T));
        }
      }
    }
  }
};

// Calls with few rows are FewForm's.
template <class Form, class FewForm = Form>
constexpr AttentionKernels attention_of(const char* name) {
  const auto scratch_bytes = [](const Attention& call, int64_t count) {
    return call.has_few_rows() ? Block<FewForm>::scratch_bytes(call, count) : Block<Form>::scratch_bytes(call, count);
  };
  const auto attend = [](const QueryBlock& block) {
    return block.call->has_few_rows() ? Block<FewForm>::attend(block) : Block<Form>::attend(block);
  };
  return {name, Form::takes, scratch_bytes, attend, summarize<typename Form::Vec>};
}

}  // namespace
}  // namespace int8compile
