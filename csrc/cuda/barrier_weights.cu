// Rewards -> estimates -> multipliers -> one signed weight per sequence, in one launch of one block: thread after
// thread takes a reward, then a constraint, then a response. Sums are in the reference's order, so a reward's is one
// thread's; compiled without contraction to fused multiply-adds (-fmad=false), which would change bits.
#include "cuda/barrier_weights.h"

namespace l3m::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStaged = 4096;  // rewards in shared memory, 32 KiB

// The sums of rewards first to first + width (at most kThreads), a reward per thread. The whole block fetches the rows,
// which one thread alone would wait for again and again. All threads call this.
__device__ Sums sums_of(const BarrierWeights& a, int64_t first, int width) {
  __shared__ double staged[kStaged];
  const int thread = static_cast<int>(threadIdx.x), rows = kStaged / width;
  Sums sums{0.0, 0.0, 0.0};
  for (int64_t row = 0; row < a.sequences; row += rows) {
    const int count = static_cast<int>(row + rows < a.sequences ? rows : a.sequences - row);
    const double* rewards = a.rewards + row * a.reward_count + first;
    __syncthreads();
    for (int i = thread; i < count * width; i += kThreads) staged[i] = rewards[i / width * a.reward_count + i % width];
    __syncthreads();
    if (thread < width) {
      for (int i = 0; i < count; ++i) add_reward(sums, staged[i * width + thread]);
    }
  }
  return sums;
}

__device__ void take_reward(const BarrierWeights& a, int64_t r, const Sums& sums) {
  const Average average = advance_row(a.state + r * a.width, a.new_state + r * a.width, a.width, sums, a.smoothing);
  a.estimate[r] = average.estimate;
  a.stderr_[r] = standard_error(average, sqrt(scaled_variance(average)));
  a.advantages[r] = Advantage::of(sums, sqrt(mean_square(sums)), average.estimate, a.leave_one_out);
}

__device__ bool exists(const BarrierWeights& a, int64_t reward) { return 0 <= reward && reward < a.reward_count; }

__device__ void take_constraint(const BarrierWeights& a, int64_t k) {
  const int64_t r = a.reward_index[k];
  if (!exists(a, r)) {
    a.violation[k] = a.multiplier[k] = kNaN;
    return;
  }
  const bool seen = a.new_state[r * a.width] > 0.0;
  a.violation[k] = seen ? violation(a.bounds[k], a.estimate[r], a.stderr_[r]) : kNaN;
  a.multiplier[k] = seen ? barrier_multiplier(a.violation[k], *a.mu, *a.s) : 0.0;
}

__device__ void take_response(const BarrierWeights& a, int64_t n) {
  double weight = 0.0;
  for (int64_t k = 0; k < a.constraints; ++k) {
    const int64_t r = a.reward_index[k];
    weight += a.factors[k] * (exists(a, r) ? a.advantages[r](a.rewards[n * a.reward_count + r]) : kNaN);
  }
  a.seq_weight[n] = normalised(weight, a.norm[n]);
}

// One block: what a thread writes to memory, the others read after the barrier.
__global__ void __launch_bounds__(kThreads, 1) barrier_weights_kernel(BarrierWeights a) {
  for (int64_t first = 0; first < a.reward_count; first += kThreads) {
    const int width = static_cast<int>(first + kThreads < a.reward_count ? kThreads : a.reward_count - first);
    const int64_t r = first + threadIdx.x;
    Sums sums{};
    if (a.sums == nullptr) {
      sums = sums_of(a, first, width);
    } else if (r < a.reward_count) {
      sums = a.sums[r];
    }
    if (r < a.reward_count) take_reward(a, r, sums);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < a.constraints; k += kThreads) take_constraint(a, k);
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (int64_t k = 0; k < a.constraints; ++k) total += a.multiplier[k];
    *a.total = clamp_min(total, 1.0);
  }
  __syncthreads();
  for (int64_t k = threadIdx.x; k < a.constraints; k += kThreads) {
    a.factors[k] = weight_factor(a.bounds[k], a.multiplier[k], *a.total);
  }
  __syncthreads();
  for (int64_t n = threadIdx.x; n < a.sequences; n += kThreads) take_response(a, n);
}

}  // namespace

cudaError_t barrier_weights(const BarrierWeights& arguments, cudaStream_t stream) {
  barrier_weights_kernel<<<1, kThreads, 0, stream>>>(arguments);
  return cudaPeekAtLastError();
}

}  // namespace l3m::cuda
