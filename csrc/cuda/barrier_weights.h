// Launch of the kernel from rewards to weights: raw pointers and a stream, no torch. Letters: N sequences, R rewards,
// K one-sided constraints. Matrices are row-major, all numbers float64.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "trend.h"

namespace l3m::cuda {

struct BarrierWeights {
  int64_t sequences, reward_count, constraints;  // N, R, K
  const double* rewards;                         // (N, R), NaN where a response is excluded
  const double* norm;                            // (N,)
  const Sums* sums;                              // (R,), or null: those of rewards
  const double* state;                           // (R, width), a moving average or a filter
  int64_t width;
  const int64_t* reward_index;  // (K,); one outside [0, R) makes its constraint NaN
  const Bound* bounds;          // (K,)
  const double* mu;             // (1,)
  const double* s;              // (1,)
  double smoothing;
  bool leave_one_out;
  Advantage* advantages;  // (R,) scratch
  double* factors;        // (K,) scratch
  float* seq_weight;      // (N,)
  double* multiplier;     // (K,)
  double* total;          // (1,)
  double* violation;      // (K,)
  double* estimate;       // (R,)
  double* stderr_;        // (R,); `stderr` is a macro of the C library
  double* new_state;      // (R, width), may not overlap state
};

// Queues one kernel of one block. The bits are those of reference.barrier_weights, where that adds up in the order of
// the rows (on a CPU; a GPU's cumsum does not) and but for torch's square root on a CPU, an ulp off now and then.
cudaError_t barrier_weights(const BarrierWeights& arguments, cudaStream_t stream);

}  // namespace l3m::cuda
