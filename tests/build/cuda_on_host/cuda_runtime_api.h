// CUDA's kernel language on a CPU, as much of it as csrc/cuda uses: one block after the other, its threads as fibers
// that the scheduler takes up in a random order and leaves at barriers alone.
// Where a barrier is missing some order shows it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct float4 {
  float x, y, z, w;
};

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

namespace on_host {

enum class State { ready, at_warp_barrier, at_block_barrier, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  State state;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<float> slots;
inline std::function<void()> body;
inline std::mt19937 order;

inline void wait(State state) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state;
  swapcontext(&self.context, &scheduler);
}

inline void run() {
  body();
  wait(State::done);
}

// Lets the fibers of [first, last) go on if all that are not done wait at `state`.
inline bool release(size_t first, size_t last, State state) {
  bool any = false;
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != state) return false;
    any = true;
  }
  for (size_t i = first; i < last && any; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::ready;
  }
  return any;
}

inline void block() {
  const size_t threads = blockDim.x;
  if (fibers.size() < threads) fibers.resize(threads);
  slots.resize(threads);
  for (size_t i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.stack.resize(1 << 15);
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.context, run, 0);
  }
  for (;;) {
    std::vector<unsigned> ready;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].state == State::ready) ready.push_back(i);
    }
    if (ready.empty()) {
      bool released = release(0, threads, State::at_block_barrier);
      for (size_t warp = 0; warp < threads; warp += 32) {
        released = release(warp, warp + 32, State::at_warp_barrier) || released;
      }
      if (released) continue;
      for (size_t i = 0; i < threads; ++i) {
        if (fibers[i].state != State::done) {
          std::fprintf(stderr, "thread %zu waits at a barrier that not all threads reach\n", i);
          std::abort();
        }
      }
      return;
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (unsigned i : ready) {
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
    }
  }
}

// kernel<<<blocks, threads>>>; of a grid that is smaller than asked for, if `largest_grid` is: kernels stride over it.
inline unsigned largest_grid = 1u << 31;
inline void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  blocks = std::min(blocks, largest_grid);
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) block();
}

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::State::at_block_barrier); }

inline float __shfl_down_sync(unsigned, float x, int step) {
  const unsigned thread = threadIdx.x;
  on_host::slots[thread] = x;
  on_host::wait(on_host::State::at_warp_barrier);
  const float found = thread % 32 + step < 32 ? on_host::slots[thread + step] : x;
  on_host::wait(on_host::State::at_warp_barrier);
  return found;
}
