// CUDA's threads on the host, for tests: one block at a time, each thread a fiber. A warp runs
// alone until all of it waits at a barrier, and its lanes one after another until they wait in a
// shuffle, both in a chosen order, so that a forgotten barrier changes values. Shared memory holds
// NaN until it is written. A barrier or shuffle that some threads never reach is an error.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace softmask::cuda {

struct Index {
  unsigned x = 0, y = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

namespace host {

constexpr unsigned kLanes = 32, kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 << 10;  // what a kernel has without asking for more
constexpr size_t kStackBytes = 256 << 10;

enum class Order : int { kAscending, kDescending, kRandom };
inline Order order = Order::kAscending;

// Where a thread waits: at a barrier of its block or in a shuffle of its warp.
struct Place {
  const char* kind = nullptr;  // null for a thread that can run
  const char* file = nullptr;
  int line = 0;

  bool operator==(const Place& other) const {
    return kind == other.kind && line == other.line &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
  std::string text() const {
    const char* name = std::strrchr(file, '/');
    return std::string("the ") + kind + " in " + (name == nullptr ? file : name + 1) + ":" +
           std::to_string(line);
  }
};

inline constexpr char kBarrier[] = "barrier", kShuffle[] = "shuffle";

struct Fiber {
  ucontext_t begins;  // not a local variable: its frame would never be left
  jmp_buf resumes;
  bool started = false;
  void* fake_stack = nullptr;  // the address sanitizer's
  std::unique_ptr<char[]> stack;
  Place waits;
  bool ended = false;
  std::array<float, 2> shown;  // what the other lanes read in the latest two shuffles
  unsigned shuffles = 0;
};

// The threads of one block, and the order in which they run.
class Block {
 public:
  // Runs body once per thread.
  void run(unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
    body_ = &body;
    memory_.reset(new unsigned char[std::max<size_t>(shared_bytes, 1)]);
    std::memset(memory_.get(), 0xff, shared_bytes);
    fibers_.resize(std::max<size_t>(fibers_.size(), threads));
    threads_ = threads;
    for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers_[thread]);
    const unsigned warps = threads / kLanes;
    do {
      for (const unsigned warp : in_order(warps)) run_warp(warp * kLanes);
    } while (release());
  }

  void wait(const Place& place) {
    fibers_[current_].waits = place;
    yield(fibers_[current_], &fibers_[current_].fake_stack);
  }

  float exchange(float value, unsigned lanes, const Place& place) {
    Fiber& own = fibers_[current_];
    const unsigned turn = own.shuffles++ % 2;  // two turns: a fast lane may be one shuffle ahead
    own.shown[turn] = value;
    const unsigned other = current_ ^ lanes;
    wait(place);
    return fibers_[other].shown[turn];
  }

  float* memory() { return reinterpret_cast<float*>(memory_.get()); }

 private:
  std::vector<Fiber> fibers_;
  std::unique_ptr<unsigned char[]> memory_;
  const std::function<void()>* body_ = nullptr;
  jmp_buf scheduler_;
  unsigned threads_ = 0, current_ = 0;
  std::minstd_rand random_{7};
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;

  static void prepare(Fiber& fiber) {
    if (fiber.stack == nullptr) fiber.stack.reset(new char[kStackBytes]);
    fiber.waits = {};
    fiber.started = fiber.ended = false;
    fiber.shuffles = 0;
  }

  // 0 to count - 1 in the chosen order.
  std::vector<unsigned> in_order(unsigned count) {
    std::vector<unsigned> numbers(count);
    std::iota(numbers.begin(), numbers.end(), 0u);
    if (order == Order::kDescending) std::reverse(numbers.begin(), numbers.end());
    if (order == Order::kRandom) std::shuffle(numbers.begin(), numbers.end(), random_);
    return numbers;
  }

  // Runs a warp as far as it gets without the others: to a barrier of the block or to its end.
  void run_warp(unsigned first) {
    do {
      for (const unsigned lane : in_order(kLanes)) {
        const Fiber& fiber = fibers_[first + lane];
        if (!fiber.ended && fiber.waits.kind == nullptr) resume(first + lane);
      }
    } while (let_go(first, first + kLanes, kShuffle));
  }

  void resume(unsigned thread) {
    current_ = thread;
    threadIdx.x = thread;
    Fiber& fiber = fibers_[thread];
    void* fake_stack = nullptr;
    start_switch(&fake_stack, fiber.stack.get(), kStackBytes);
    if (_setjmp(scheduler_) == 0) {
      if (fiber.started) _longjmp(fiber.resumes, 1);
      start(fiber);
    }
    finish_switch(fake_stack, nullptr, nullptr);
  }

  // ucontext gives a thread its stack. Later switches are setjmp's, which are ten times as fast,
  // because they do not ask the operating system for the signal mask.
  static void start(Fiber& fiber) {
    getcontext(&fiber.begins);
    fiber.begins.uc_stack.ss_sp = fiber.stack.get();
    fiber.begins.uc_stack.ss_size = kStackBytes;
    fiber.begins.uc_link = nullptr;
    makecontext(&fiber.begins, &Block::enter, 0);
    fiber.started = true;
    setcontext(&fiber.begins);
  }

  static void enter();

  // Back to the scheduler, until it resumes the thread.
  void yield(Fiber& fiber, void** fake_stack) {
    start_switch(fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    if (_setjmp(fiber.resumes) == 0) _longjmp(scheduler_, 1);
    finish_switch(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }

  // The address sanitizer must know which stack is in use. A null fake_stack ends a thread.
  static void start_switch(void** fake_stack, const void* stack, size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
  }
  static void finish_switch(void* fake_stack, const void** stack, size_t* bytes) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
    (void)fake_stack, (void)stack, (void)bytes;
#endif
  }

  // Lets all threads pass a barrier. Returns false if they have ended instead.
  bool release() {
    const auto first = fibers_.begin(), last = first + threads_;
    if (std::all_of(first, last, [](const Fiber& one) { return one.ended; })) return false;
    if (let_go(0, threads_, kBarrier)) return true;
    const std::string reason = stuck();
    fibers_.clear();  // with their stacks, whose frames are never left
    throw std::logic_error(reason);
  }

  bool let_go(unsigned first, unsigned last, const char* kind) {
    const Place place = fibers_[first].waits;
    if (place.kind != kind) return false;
    for (unsigned thread = first; thread < last; ++thread) {
      if (fibers_[thread].ended || !(fibers_[thread].waits == place)) return false;
    }
    for (unsigned thread = first; thread < last; ++thread) fibers_[thread].waits = {};
    return true;
  }

  std::string stuck() const {
    unsigned waiting = 0;
    while (fibers_[waiting].ended) ++waiting;
    unsigned other = 0;
    while (other == waiting ||
           (!fibers_[other].ended && fibers_[other].waits == fibers_[waiting].waits))
      ++other;
    const Fiber& apart = fibers_[other];
    return "block " + std::to_string(blockIdx.x) + ": thread " + std::to_string(waiting) +
           " waits at " + fibers_[waiting].waits.text() + ", which thread " +
           std::to_string(other) +
           (apart.ended ? " never reaches: it has ended"
                        : " does not reach: it waits at " + apart.waits.text());
  }
};

inline Block block;

inline void Block::enter() {
  finish_switch(nullptr, &block.scheduler_stack_, &block.scheduler_stack_bytes_);
  (*block.body_)();
  Fiber& fiber = block.fibers_[block.current_];
  fiber.ended = true;
  block.yield(fiber, nullptr);
}

}  // namespace host

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  host::block.wait({host::kBarrier, file, line});
}

inline float shuffle_xor(float value, int lanes, const char* file = __builtin_FILE(),
                         int line = __builtin_LINE()) {
  return host::block.exchange(value, lanes, {host::kShuffle, file, line});
}

inline float* shared_memory() { return host::block.memory(); }

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), unsigned blocks, unsigned layers, unsigned threads,
           size_t shared_bytes, Stream, const Arguments&... arguments) {
  if (threads % host::kLanes != 0 || threads > host::kMaxThreads || layers > 0xffff ||
      shared_bytes > host::kMaxSharedBytes) {
    throw std::logic_error("a GPU refuses this launch: " + std::to_string(layers) + " layers, " +
                           std::to_string(threads) + " threads, " + std::to_string(shared_bytes) +
                           " bytes of shared memory");
  }
  gridDim = {blocks, layers};
  blockDim = {threads, 1};
  for (blockIdx.y = 0; blockIdx.y < layers; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
      host::block.run(threads, shared_bytes, [&] { kernel(arguments...); });
    }
  }
}

}  // namespace softmask::cuda
