// The scheduler, the memory and the instructions behind emulation.h.

#include "emulation.h"

#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t kStack = 64 * 1024;
constexpr int kMostShared = 99 * 1024;  // of a block on sm_86, sm_89 and sm_120, the least of all that are supported

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  int barriers, waits;  // how many it has come to
  bool done;
  std::vector<std::vector<Copy>> groups;  // of cp.async, oldest first; the last one is open
};

struct Warp {
  int arrived;
  void (*execute)(void**);
  void* lanes[32];
};

struct Settings {
  unsigned seed = 0;
  int skip_barrier = -1, skip_wait = -1;  // the ordinal, in each thread's life, of one that is left out
  int multiprocessors = 2, capability = 80;
} settings;

std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
std::vector<int> runnable, at_barrier;
std::mt19937 random_numbers;
const std::function<void()>* body;
ucontext_t scheduler;
const void* scheduler_stack;
size_t scheduler_stack_size;
char* shared_memory;
int shared_size, current, unfinished, most_barriers, most_waits;

[[noreturn]] void stop(const char* what) {
  std::fprintf(stderr, "emulation: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::fflush(stderr);
  std::_Exit(3);
}

void arrive(int fiber) {
  current = fiber;
  threadIdx.x = static_cast<unsigned>(fiber);
}

// Gives the CPU to a thread that can run, drawn at random. Comes back when this one can again.
void yield() {
  const int self = current;
  Fiber& mine = *fibers[self];
  if (runnable.empty()) {
    if (!mine.done || unfinished > 0) {
      stop("nothing can run: some threads wait for others that will not come");
    }
    __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
    setcontext(&scheduler);
  }
  const size_t pick = random_numbers() % runnable.size();
  const int next = runnable[pick];
  runnable[pick] = runnable.back();
  runnable.pop_back();
  if (next == self) {
    return;
  }
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(mine.done ? nullptr : &fake, fibers[next]->stack.get(), kStack);
  arrive(next);
  swapcontext(&mine.context, &fibers[next]->context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  arrive(self);
}

void enter() {
  const void* from;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &from, &size);
  if (scheduler_stack == nullptr) {
    scheduler_stack = from;
    scheduler_stack_size = size;
  }
  (*body)();
  Fiber& mine = *fibers[current];
  mine.done = true;
  most_barriers = std::max(most_barriers, mine.barriers);
  most_waits = std::max(most_waits, mine.waits);
  --unfinished;
  yield();
}

void run_block(int threads) {
  std::memset(shared_memory, 0xcb, shared_size);
  warps.assign(threads / 32, Warp{});
  runnable.clear();
  at_barrier.clear();
  unfinished = threads;
  scheduler_stack = nullptr;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.barriers = fiber.waits = 0;
    fiber.done = false;
    fiber.groups.assign(1, {});
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    runnable.push_back(i);
  }
  const int first = static_cast<int>(random_numbers() % threads);
  runnable[first] = runnable.back();
  runnable.pop_back();
  arrive(first);
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fibers[first]->stack.get(), kStack);
  swapcontext(&scheduler, &fibers[first]->context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

template <class Value>
struct Mma {
  Value* c;
  const uint32_t* a;
  uint32_t b[2];
};

// The bytes that fragments A and B hold, as 16 and 8 rows of 32.
template <class Value>
void unpack(Mma<Value>** lanes, uint8_t (&a)[16][32], uint8_t (&b)[8][32]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int part = 0; part < 4; ++part) {
      std::memcpy(&a[g + part % 2 * 8][part / 2 * 16 + 4 * t], &lanes[lane]->a[part], 4);
    }
    for (int part = 0; part < 2; ++part) {
      std::memcpy(&b[g][part * 16 + 4 * t], &lanes[lane]->b[part], 4);
    }
  }
}

template <class Value, class Element, class Decode>
void multiply(Mma<Value>** lanes, Decode decode) {
  uint8_t a[16][32], b[8][32];
  unpack(lanes, a, b);
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      for (size_t k = 0; k < 32 / sizeof(Element); ++k) {
        Element left, right;
        std::memcpy(&left, &a[row][k * sizeof(Element)], sizeof(Element));
        std::memcpy(&right, &b[col][k * sizeof(Element)], sizeof(Element));
        lanes[lane]->c[i] += decode(left) * decode(right);
      }
    }
  }
}

struct MmaS8 : Mma<int32_t> {
  static void execute(MmaS8** lanes) {
    multiply<int32_t, int8_t>(reinterpret_cast<Mma<int32_t>**>(lanes), [](int8_t v) { return int32_t(v); });
  }
};

struct MmaF16 : Mma<float> {
  static void execute(MmaF16** lanes) {
    multiply<float, uint16_t>(reinterpret_cast<Mma<float>**>(lanes), int8compile::from_f16_bits);
  }
};

struct MmaBF16 : Mma<float> {
  static void execute(MmaBF16** lanes) {
    multiply<float, uint16_t>(reinterpret_cast<Mma<float>**>(lanes), int8compile::from_bf16_bits);
  }
};

struct LoadMatrix {
  uint32_t* out;
  const char* row;

  static void execute(LoadMatrix** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;  // of 16 bytes
      for (int row = 0; row < 8; ++row) {
        const char* from = lanes[matrix * 8 + row]->row;
        const int64_t offset = from - shared_memory;
        if (offset < 0 || offset + 16 > shared_size || offset % 16 != 0) {
          stop("ldmatrix: a row is misaligned or outside of shared memory");
        }
        banks |= 1u << (offset / 16 % 8);
        for (int t = 0; t < 4; ++t) {
          std::memcpy(&lanes[row * 4 + t]->out[matrix], from + 4 * t, 4);
        }
      }
      if (banks != 0xff) {
        stop("ldmatrix: rows of a matrix share banks");
      }
    }
  }
};

void deliver(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, copy.bytes);
  } else {
    std::memset(copy.to, 0, copy.bytes);
  }
}

}  // namespace

void fail(const char* what) {
  stop(what);
}

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || threads < 32 || threads > 1024 || shared_bytes > kMostShared) {
    stop("a launch with a bad number of threads or too much shared memory");
  }
  random_numbers.seed(settings.seed);
  while (fibers.size() < static_cast<size_t>(threads)) {
    fibers.push_back(std::make_unique<Fiber>());
  }
  std::vector<int64_t> order(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    order[i] = i;
  }
  std::shuffle(order.begin(), order.end(), random_numbers);
  body = &kernel;
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max(shared_bytes, 1)) != 0) {
    stop("out of memory");
  }
  shared_memory = static_cast<char*>(memory);
  shared_size = shared_bytes;
  for (const int64_t block : order) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block(threads);
  }
  std::free(memory);
}

void barrier() {
  if (fibers[current]->barriers++ == settings.skip_barrier) {
    return;
  }
  at_barrier.push_back(current);
  if (at_barrier.size() == blockDim.x) {
    runnable.insert(runnable.end(), at_barrier.begin(), at_barrier.end());
    at_barrier.clear();
  }
  yield();
}

void collective(void* operands, void (*execute)(void**)) {
  Warp& warp = warps[current / 32];
  if (warp.arrived > 0 && warp.execute != execute) {
    stop("lanes of a warp are at different instructions");
  }
  warp.execute = execute;
  warp.lanes[current % 32] = operands;
  if (++warp.arrived < 32) {
    yield();
    return;
  }
  execute(warp.lanes);
  warp.arrived = 0;
  for (int i = current / 32 * 32; i < current / 32 * 32 + 32; ++i) {
    if (i != current) {
      runnable.push_back(i);
    }
  }
}

}  // namespace emulation

namespace int8compile {

using namespace emulation;

char* dynamic_shared() {
  return shared_memory;
}

void cp_async(void* to, const void* from, int bytes, bool valid) {
  const int64_t offset = static_cast<char*>(to) - shared_memory;
  if (offset < 0 || offset + bytes > shared_size || offset % bytes != 0 ||
      reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    stop("cp.async: misaligned, or to outside of shared memory");
  }
  std::memset(to, 0xa5, bytes);
  fibers[current]->groups.back().push_back({to, from, bytes, valid});
}

void cp_async_commit() {
  fibers[current]->groups.emplace_back();
}

void cp_async_wait_for(int pending) {
  Fiber& fiber = *fibers[current];
  if (fiber.waits++ == settings.skip_wait) {
    return;
  }
  while (fiber.groups.size() > static_cast<size_t>(pending) + 1) {
    for (const Copy& copy : fiber.groups.front()) {
      deliver(copy);
    }
    fiber.groups.erase(fiber.groups.begin());
  }
}

void ldmatrix_x4(uint32_t (&out)[4], const void* row) {
  LoadMatrix operands{out, static_cast<const char*>(row)};
  collective(operands);
}

void mma_s8(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaS8 operands{{c, a, {b0, b1}}};
  collective(operands);
}

void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaF16 operands{{c, a, {b0, b1}}};
  collective(operands);
}

void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaBF16 operands{{c, a, {b0, b1}}};
  collective(operands);
}

float from_f16_bits(uint16_t bits) {
  return c10::Half(bits, c10::Half::from_bits());
}

uint16_t to_f16_bits(float value) {
  return c10::Half(value).x;
}

float from_bf16_bits(uint16_t bits) {
  return c10::BFloat16(bits, c10::BFloat16::from_bits());
}

uint16_t to_bf16_bits(float value) {
  return c10::BFloat16(value).x;
}

Gpu current_gpu() {
  return {0, settings.multiprocessors, settings.capability};
}

bool wgmma_available() {
  return false;
}

cudaError_t launch_wgmma(
    int, const Activation&, const Quantized&, const Product&, float, const Gathered&, bool, cudaStream_t) {
  return cudaErrorNotSupported;
}

}  // namespace int8compile

extern "C" {

void emulation_set(unsigned seed, int skip_barrier, int skip_wait, int multiprocessors) {
  using emulation::settings;
  settings.seed = seed;
  settings.skip_barrier = skip_barrier;
  settings.skip_wait = skip_wait;
  settings.multiprocessors = multiprocessors;
  emulation::most_barriers = emulation::most_waits = 0;
}

// The most barriers, and waits for copies, that a thread has come to since the last emulation_set().
int emulation_barriers() {
  return emulation::most_barriers;
}

int emulation_waits() {
  return emulation::most_waits;
}
}
