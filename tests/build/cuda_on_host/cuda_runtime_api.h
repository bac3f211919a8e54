// CUDA's kernel language on a CPU, as much of it as csrc/cuda uses: one cluster of blocks after the other (a block, where
// nobody asks for a cluster), its threads as fibers that the scheduler takes up in a random order and leaves at barriers
// alone. Blocks and warps come on at different speeds. Where a barrier is missing some order shows it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};

struct Dim {
  unsigned x, y = 1, z = 1;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNotSupported = 801 };
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

namespace on_host {

enum class State { ready, at_warp_barrier, at_block_barrier, at_cluster_barrier, done };
constexpr unsigned kWarp = 32;

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  bool started;
  unsigned arrivals;  // at the cluster's barrier
  bool arrived;       // and has not waited yet
  static constexpr size_t kStack = 1 << 15;
};

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, why);
  std::abort();
}

inline jmp_buf scheduler;
inline std::vector<Fiber> fibers;  // of a cluster, block after block
inline std::vector<float> slots;   // of shuffles
inline unsigned current;           // fiber
inline unsigned cluster_blocks;
inline unsigned phase, arrived, live;  // the cluster's barrier: how often it opened, who is there, who can still come
inline std::vector<std::map<int, std::vector<char>>>
    shared;  // per block: a variable's place in the source -> its memory
inline std::function<void()> body;
inline std::mt19937 order;

inline unsigned rank() { return current / blockDim.x; }

inline void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (!_setjmp(self.place)) _longjmp(scheduler, 1);
}

inline void go_on(unsigned fiber) {
  current = fiber;
  threadIdx.x = fiber % blockDim.x;
  blockIdx.x = blockIdx.x / cluster_blocks * cluster_blocks + rank();
  if (_setjmp(scheduler)) return;
  Fiber& next = fibers[fiber];
  if (next.started) _longjmp(next.place, 1);
  next.started = true;
  setcontext(&next.context);
}

// Lets the fibers of [first, last) go on if all that are not done wait at `state`.
inline void release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state != State::done && fibers[i].state != state) return;
  }
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state == state) fibers[i].state = State::ready;
  }
}

// Opens the cluster's barrier if all who can come are there.
inline void open_cluster() {
  if (live == 0 || arrived < live) return;
  ++phase;
  arrived = 0;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::at_cluster_barrier) fiber.state = State::ready;
  }
}

inline void run() {
  body();
  const Fiber& self = fibers[current];
  arrived -= self.arrivals > phase;
  --live;
  open_cluster();
  wait(State::done);
}

// Shared memory of a block: not a number before it is written.
inline std::vector<char>& shared_of(unsigned block, int place, size_t size) {
  auto& memory = shared[block][place];
  if (memory.empty()) memory.assign(size, static_cast<char>(0xff));
  return memory;
}

inline void make_fibers(size_t count) {
  fibers.resize(count);
  slots.resize(count);
  for (Fiber& fiber : fibers) {
    fiber.state = State::ready;
    fiber.started = false;
    fiber.arrivals = 0;
    fiber.arrived = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    makecontext(&fiber.context, run, 0);
  }
  shared.assign(cluster_blocks, {});
  phase = arrived = 0;
  live = count;
}

inline void cluster() {
  make_fibers(size_t{blockDim.x} * cluster_blocks);
  const unsigned warps_of_block = (blockDim.x + kWarp - 1) / kWarp;
  const auto draw = [](size_t below) { return static_cast<unsigned>(order() % below); };
  const unsigned steadiness = draw(9);  // of eight turns, how many stay with a block that can go on
  unsigned favourite = 0;
  std::vector<unsigned> ready;     // lanes
  std::vector<unsigned> runnable;  // blocks, or warps of a block
  const auto lanes = [&](unsigned block, unsigned warp) {
    ready.clear();
    const unsigned first = block * blockDim.x + warp * kWarp;
    for (unsigned i = first; i < std::min(first + kWarp, (block + 1) * blockDim.x); ++i) {
      if (fibers[i].state == State::ready) ready.push_back(i);
    }
    return !ready.empty();
  };
  const auto find_warps = [&](unsigned block) {
    runnable.clear();
    for (unsigned warp = 0; warp < warps_of_block; ++warp) {
      if (lanes(block, warp)) runnable.push_back(warp);
    }
    return !runnable.empty();
  };
  for (;;) {
    unsigned block = favourite;
    if (draw(8) >= steadiness) block = draw(cluster_blocks);
    for (unsigned tried = 0; tried < cluster_blocks && !find_warps(block); ++tried)
      block = (block + 1) % cluster_blocks;
    if (runnable.empty()) {
      for (const Fiber& fiber : fibers) {
        if (fiber.state != State::done) die("a thread waits at a barrier that not all threads reach");
      }
      return;
    }
    favourite = block;
    const unsigned warp = runnable[draw(runnable.size())];
    lanes(block, warp);
    std::shuffle(ready.begin(), ready.end(), order);
    if (draw(2)) ready.resize(1 + draw(ready.size()));
    for (unsigned i : ready) go_on(i);
    const size_t first = size_t{block} * blockDim.x;
    release(first + warp * kWarp, std::min(first + (warp + 1) * kWarp, first + blockDim.x), State::at_warp_barrier);
    release(first, first + blockDim.x, State::at_block_barrier);
  }
}

inline void launch_clusters(unsigned blocks, unsigned threads, unsigned in_cluster, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim.x = blocks, blockDim.x = threads;
  cluster_blocks = in_cluster;
  for (unsigned first = 0; first < blocks; first += in_cluster) {
    blockIdx.x = first;
    cluster();
  }
}

// kernel<<<blocks, threads>>>; of a grid that is smaller than asked for, if `largest_grid` is: kernels stride over it.
inline unsigned largest_grid = 1u << 31;
inline void launch(unsigned blocks, unsigned threads, std::function<void()> kernel) {
  launch_clusters(std::min(blocks, largest_grid), threads, 1, std::move(kernel));
}

// `__shared__ Type name[count];` in the tests' copy of a source, with Type[count] and a number of the place for it.
template <typename Type>
Type& shared_variable(int place) {
  return *reinterpret_cast<Type*>(shared_of(rank(), place, sizeof(Type)).data());
}

// What the device that the tests want can do.
inline int has_clusters = 1, code_of = 90;

}  // namespace on_host

inline void __syncthreads() { on_host::wait(on_host::State::at_block_barrier); }

inline float __shfl_down_sync(unsigned, float x, int step) {
  const unsigned lane = threadIdx.x % on_host::kWarp, fiber = on_host::current;
  on_host::slots[fiber] = x;
  on_host::wait(on_host::State::at_warp_barrier);
  const float found = lane + step < on_host::kWarp ? on_host::slots[fiber + step] : x;
  on_host::wait(on_host::State::at_warp_barrier);
  return found;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

// ---- launches with attributes, and what a device says of itself

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    Dim clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  Dim gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  const unsigned blocks = config->numAttrs ? config->attrs->val.clusterDim.x : 1, most = 8;
  if (!on_host::has_clusters || blocks > most || config->gridDim.x % blocks != 0) return cudaErrorInvalidValue;
  on_host::launch_clusters(config->gridDim.x, config->blockDim.x, blocks, [=] { kernel(arguments...); });
  return cudaSuccess;
}

enum cudaDeviceAttr { cudaDevAttrClusterLaunch = 120 };
struct cudaFuncAttributes {
  int ptxVersion;
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = on_host::has_clusters;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = on_host::code_of;
  return cudaSuccess;
}
