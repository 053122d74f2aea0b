// What attention reads of its tensors before it multiplies: rows, magnitudes, and masks as numbers to add.

#pragma once

#include <cstdint>
#include <limits>

#include "attention.h"
#include "softmax.h"

namespace int8compile {
namespace {

template <class T>
inline const T* row_of(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
  return static_cast<const T*>(heads.data) + batch * heads.batch + head * heads.head + row * heads.row;
}

// The largest magnitude in [rows, cols]; infinity where there is a NaN.
template <class Vec, class T>
float magnitude_of(const T* from, int64_t stride, int64_t rows, int64_t cols) {
  Vec most = Vec::all(0.0f);
  for (int64_t row = 0; row < rows; ++row, from += stride) {
    for (int64_t at = 0; at < cols; at += Vec::width) {
      most = Vec::max_magnitude(most, load_some<Vec>(from + at, cols - at));
    }
  }
  float lanes[Vec::width];
  most.store(lanes);
  float result = 0;
  for (const float lane : lanes) {
    if (lane != lane) {
      return std::numeric_limits<float>::infinity();
    }
    result = lane > result ? lane : result;
  }
  return result;
}

// `count` numbers of a mask's row, as floats to add to scores.
template <class Vec>
void mask_row(const Attention& call, int64_t batch, int64_t head, int64_t query, int64_t key, int64_t count, float* to) {
  switch (call.mask_type) {
    case MaskType::none:
      for (int64_t i = 0; i < count; ++i) {
        to[i] = 0.0f;
      }
      return;
    case MaskType::boolean: {
      const uint8_t* from = row_of<uint8_t>(call.mask, batch, head, query) + key;
      for (int64_t i = 0; i < count; ++i) {
        to[i] = from[i] != 0 ? 0.0f : kMinusInfinity;
      }
      return;
    }
    case MaskType::added:
      with_type(call.type, [&](auto sample) {
        const auto* from = row_of<decltype(sample)>(call.mask, batch, head, query) + key;
        for (int64_t at = 0; at < count; at += Vec::width) {
          load_some<Vec>(from + at, count - at).store(to + at);
        }
      });
  }
}

template <class Vec>
void summarize(
    const Attention& call, int64_t batch, int64_t head, int64_t first, int64_t count, MaskSummary* summaries) {
  alignas(64) float row[kKeyBlock];
  const int64_t rows = call.mask.row == 0 ? 1 : count;
  for (int64_t key = 0; key < call.keys; key += kKeyBlock, ++summaries) {
    const int64_t here = call.keys - key < kKeyBlock ? call.keys - key : kKeyBlock;
    Vec largest = Vec::all(kMinusInfinity), magnitude = Vec::all(0.0f);
    for (int64_t i = 0; i < rows; ++i) {
      mask_row<Vec>(call, batch, head, first + i, key, here, row);
      for (int64_t at = here; at % Vec::width != 0; ++at) {
        row[at] = row[here - 1];
      }
      for (int64_t at = 0; at < here; at += Vec::width) {
        const Vec value = Vec::load(row + at);
        largest = Vec::larger(value, largest);
        magnitude = Vec::max_magnitude(magnitude, value);
      }
    }
    float lanes[Vec::width];
    magnitude.store(lanes);
    float most = 0;
    bool nan = false;
    for (const float lane : lanes) {
      most = lane > most ? lane : most;
      nan = nan || lane != lane;
    }
    *summaries = {nan ? kLargestFloat : largest.largest(), !nan && most == 0};
  }
}

}  // namespace
}  // namespace int8compile
