// ATen's parallel_for for programs without torch: real threads, one an even part, so that state a thread keeps counts.

#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int& threads() {
  static int count = 1;
  return count;
}

inline int get_num_threads() {
  return threads();
}

// (No program here calls parallel_for within one.)
inline bool in_parallel_region() {
  return false;
}

template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) {
    return;
  }
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t parts = std::min<int64_t>(threads(), most), size = (end - begin + parts - 1) / parts;
  if (parts == 1) {
    return body(begin, end);
  }
  std::vector<std::thread> running;
  for (int64_t from = begin; from < end; from += size) {
    running.emplace_back([=, &body] { body(from, std::min(end, from + size)); });
  }
  for (std::thread& thread : running) {
    thread.join();
  }
}

}  // namespace at
