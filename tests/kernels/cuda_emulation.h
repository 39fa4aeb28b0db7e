// Runs the kernels of csrc/cuda on the CPU: every CUDA thread of a block is a coroutine, blocks run one after another.
//
// Barriers and warp intrinsics hand over to the next thread, so a block that forgets a barrier reads stale values in
// one of the two thread orders (EMULATION_REVERSE=1 turns it round), and one whose threads disagree on a barrier stops
// with a message. It knows nothing of memory models, streams or speed. The ops are registered for CPU tensors in a
// namespace of their own.
#pragma once

#include <cuda_runtime.h>
#include <setjmp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __forceinline__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef EMULATION_NAMESPACE
#define EMULATION_NAMESPACE bkdfast_emulated
#endif
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) EMULATION_IMPL(EMULATION_NAMESPACE, CPU, m, C10_UID)
#define EMULATION_IMPL(ns, k, m, uid) _STABLE_TORCH_LIBRARY_IMPL(ns, k, m, uid)

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Barrier {
  int size = 0, arrived = 0, generation = 0;
};

struct Thread {
  ucontext_t start;
  jmp_buf place;
  bool started = false, done = false;
  Barrier* waits = nullptr;
  int generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t values[32];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline Thread* running;

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  running->waits = &barrier;
  running->generation = barrier.generation;
  if (_setjmp(running->place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  body();
  running->done = true;
  _longjmp(scheduler, 1);
}

inline char* stack_of(int thread) {
  constexpr size_t kBytes = 128 << 10;
  static char* stacks = static_cast<char*>(std::malloc(1024 * kBytes));
  return stacks + thread * kBytes;
}

inline void resume(int index) {
  Thread& thread = threads[index];
  running = &thread;
  threadIdx.x = index;
  thread.waits = nullptr;
  if (_setjmp(scheduler)) return;
  if (thread.started) _longjmp(thread.place, 1);
  thread.started = true;
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stack_of(index);
  thread.start.uc_stack.ss_size = 128 << 10;
  makecontext(&thread.start, enter, 0);
  setcontext(&thread.start);
}

inline void run_block() {
  const bool reverse = std::getenv("EMULATION_REVERSE") != nullptr;
  const int count = static_cast<int>(threads.size());
  for (int left = count; left > 0;) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      const int index = reverse ? count - 1 - i : i;
      Thread& thread = threads[index];
      if (thread.done || (thread.waits && thread.waits->generation == thread.generation)) continue;
      resume(index);
      moved = true;
      left -= threads[index].done;
    }
    if (!moved) {
      std::fprintf(stderr, "emulation: block %u: threads wait at a barrier that others never reach\n", blockIdx.x);
      std::abort();
    }
  }
}

inline void launch(int64_t blocks, int size, std::function<void()> kernel) {
  body = std::move(kernel);
  blockDim = dim3(size);
  gridDim = dim3(static_cast<unsigned>(blocks));
  for (int64_t b = 0; b < blocks; ++b) {
    blockIdx = dim3(static_cast<unsigned>(b));
    threads.assign(size, Thread{});
    warps.assign((size + 31) / 32, Warp{});
    for (size_t w = 0; w < warps.size(); ++w) warps[w].barrier.size = std::min<int>(32, size - 32 * w);
    block = Barrier{size};
    run_block();
  }
}

template <typename T, typename Source>
T exchange(T value, Source source) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = warps[threadIdx.x / 32];
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  wait(warp.barrier);
  T result;
  std::memcpy(&result, &warp.values[source(threadIdx.x % 32)], sizeof(T));
  wait(warp.barrier);
  return result;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block); }
inline void __syncwarp() { emulation::wait(emulation::warps[threadIdx.x / 32].barrier); }
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, [mask](int lane) { return lane ^ mask; });
}
template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  return emulation::exchange(value, [from](int) { return from; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  unsigned result = 0;
  emulation::exchange<uint64_t>(vote, [&result](int lane) {
    for (int i = 0; i < 32; ++i) result |= static_cast<unsigned>(emulation::warps[threadIdx.x / 32].values[i]) << i;
    return lane;
  });
  return result;
}

template <typename T>
T atomicMin(T* address, T value) {
  return std::exchange(*address, std::min(*address, value));
}
template <typename T>
T atomicMax(T* address, T value) {
  return std::exchange(*address, std::max(*address, value));
}
template <typename T>
T atomicAdd(T* address, T value) {
  return std::exchange(*address, *address + value);
}

inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline int __ffs(unsigned value) { return value ? std::countr_zero(value) + 1 : 0; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float value) { return 1 / std::sqrt(value); }
inline double rsqrt(double value) { return 1 / std::sqrt(value); }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;

namespace bkdfast {

class Launcher {
 public:
  Launcher(const char*, const torch::stable::Tensor&) {}

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) const {
    emulation::launch(blocks, threads, [=] { kernel(arguments...); });
  }
};

}  // namespace bkdfast
