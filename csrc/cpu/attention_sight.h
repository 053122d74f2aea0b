// What a block of queries sees of a block of keys: all, nothing, or what is left once a mask is added.
//
// What a mask hides is left out where that changes nothing: a hidden score's weight is 0, and 0 times its value is 0,
// unless something is not finite. So before anything is left out, the magnitudes of queries, keys and values show that no
// score can overflow and no value is infinite or NaN. With causal attention, which sees no such keys at all, there is
// nothing to show.

#pragma once

#include <cstdint>
#include <limits>

#include "attention.h"
#include "attention_mask.h"
#include "attention_product.h"
#include "softmax.h"

namespace int8compile {
namespace {

// exp() of less is 0.
constexpr float kNegligible = -120.0f;

template <class Vec>
class Sight {
 protected:
  static constexpr int64_t width = Vec::width;

  // How the scores of a block of keys become those that the softmax is taken of.
  enum class See { nothing, all, added, up_to };

  const QueryBlock& block_;
  const Attention& call_;
  const int64_t rows_;
  float query_magnitude_ = 0;
  float *largest_, *mask_;  // [rows + width] so far; [mask_rows()][kKeyBlock]
  int32_t* visible_;  // how many keys of a block the rows of mask_ see, hidden ones at the end left out

  explicit Sight(const QueryBlock& block)
      : block_(block), call_(*block.call), rows_(block.call->group() * block.count) {
    const bool one_row = call_.mask_type == MaskType::none || call_.mask.row == 0;
    mask_row_step_ = one_row && !call_.causal ? 0 : 1;
    mask_head_step_ = block_.mask_heads > 1 ? (mask_row_step_ == 0 ? 1 : block_.count) : 0;
  }

  int64_t mask_rows() const {
    return (block_.mask_heads > 1 ? call_.group() : 1) * block_.count;
  }

  // What the queries see of a block of keys; fills mask_ and visible_ unless that is all or nothing.
  template <class T>
  See seen(int64_t key, int64_t count) {
    if (call_.causal) {
      if (key > block_.first + block_.count - 1) {
        return See::nothing;
      }
      if (key + kKeyBlock - 1 <= block_.first && count == kKeyBlock) {
        return See::all;
      }
      fill_causal(key, count);
      return See::up_to;
    }
    MaskSummary of_block = {0.0f, true};
    if (block_.summaries != nullptr) {
      of_block = block_.summaries[key / kKeyBlock];
      for (int64_t head = 1; head < block_.mask_heads; ++head) {
        const MaskSummary& next = block_.summaries[head * block_.summary_stride + key / kKeyBlock];
        of_block.largest = next.largest > of_block.largest ? next.largest : of_block.largest;
        of_block.zero = of_block.zero && next.zero;
      }
    }
    if (of_block.zero && count == kKeyBlock) {
      return See::all;
    }
    const float reach = of_block.zero ? 0.0f : largest_score<T>(key, count);
    if (!of_block.zero && reach <= kLargestFloat && is_negligible(of_block.largest + reach)) {
      return See::nothing;
    }
    fill_mask(key, count, reach <= kLargestFloat);
    return See::added;
  }

  // The keys of a block that rows of a product see, hidden ones at the end left out; sets the rows' masks.
  int64_t visible_keys(int64_t row, int rows, See see, const float** masks) const {
    if (see == See::all) {
      return kKeyBlock;
    }
    MaskRows mask_rows(*this, row);
    int64_t most = 0;
    for (int r = 0; r < rows; ++r) {
      const int64_t index = mask_rows.next();
      masks[r] = mask_ + index * kKeyBlock;
      most = visible_[index] > most ? visible_[index] : most;
    }
    return round_up(most, width);
  }

 private:
  int64_t mask_head_step_, mask_row_step_;

  // The rows of `mask_` for rows of the block, one after another.
  class MaskRows {
   public:
    MaskRows(const Sight& sight, int64_t row)
        : sight_(sight), head_(row / sight.block_.count), position_(row % sight.block_.count) {}

    int64_t next() {
      const int64_t index = head_ * sight_.mask_head_step_ + position_ * sight_.mask_row_step_;
      if (++position_ == sight_.block_.count) {
        position_ = 0;
        ++head_;
      }
      return index;
    }

   private:
    const Sight& sight_;
    int64_t head_, position_;
  };

  // What no score's magnitude exceeds; infinity where something is, or may be, not finite.
  template <class T>
  float largest_score(int64_t key, int64_t count) const {
    const T* keys = row_of<T>(call_.key, block_.batch, block_.kv_head, key);
    const T* values = row_of<T>(call_.value, block_.batch, block_.kv_head, key);
    const float value = magnitude_of<Vec>(values, call_.value.row, count, call_.value_width);
    const float product =
        float(call_.width) * (query_magnitude_ * magnitude_of<Vec>(keys, call_.key.row, count, call_.width));
    const float score = product * (call_.scale < 0 ? -call_.scale : call_.scale);
    const bool finite = value <= kLargestFloat && product <= kLargestFloat && score <= kLargestFloat;
    return finite ? score : std::numeric_limits<float>::infinity();
  }

  // Whether scores up to `most` get weights of 0 from every row.
  bool is_negligible(float most) const {
    if (most == kMinusInfinity) {
      return true;
    }
    for (int64_t row = 0; row < rows_; ++row) {
      if (!(most - largest_[row] < kNegligible)) {
        return false;
      }
    }
    return true;
  }

  void fill_causal(int64_t key, int64_t count) {
    for (int64_t i = 0; i < block_.count; ++i) {
      const int64_t most = block_.first + i + 1 - key, ends = most < 0 ? 0 : most < count ? most : count;
      visible_[i] = int32_t(ends);
      for (int64_t j = 0; j < kKeyBlock; ++j) {
        mask_[i * kKeyBlock + j] = j < ends ? -kMinusInfinity : kMinusInfinity;
      }
    }
  }

  // With `exact`, hidden keys behind the last that is visible may be left out.
  void fill_mask(int64_t key, int64_t count, bool exact) {
    const int64_t heads = mask_head_step_ == 0 ? 1 : call_.group(), rows = mask_row_step_ == 0 ? 1 : block_.count;
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t index = head * mask_head_step_ + i;
        float* to = mask_ + index * kKeyBlock;
        mask_row<Vec>(call_, block_.batch, block_.kv_head * call_.group() + head, block_.first + i, key, count, to);
        for (int64_t j = count; j < kKeyBlock; ++j) {
          to[j] = kMinusInfinity;
        }
        int64_t ends = count;
        while (exact && ends > 0 && to[ends - 1] == kMinusInfinity) {
          --ends;
        }
        visible_[index] = int32_t(ends);
      }
    }
  }
};

}  // namespace
}  // namespace int8compile
