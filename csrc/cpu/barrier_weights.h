// Rewards -> estimates -> multipliers -> one signed weight per sequence, on plain float64 arrays.
// Letters: N sequences, R rewards, K one-sided constraints. Matrices are row-major.
#pragma once

#include <cstdint>

#include "trend.h"

namespace l3m::cpu {

struct Problem {
  int64_t sequences, reward_count, constraints;  // N, R, K
  const double* rewards;                         // (N, R), NaN where a response is excluded
  const double* norm;                            // (N,)
  const double* state;                           // (R, width), a moving average or a filter
  int64_t width;
  const int64_t* reward_index;  // (K,), each in [0, R)
  const Bound* bounds;          // (K,)
  double mu, s, smoothing;
  bool leave_one_out;
  // torch's square root, in place: its vector library is an ulp off now and then, and the reference's bits are torch's.
  void (*square_root)(double* values, int64_t count);
};

struct Result {
  float* seq_weight;   // (N,)
  double* multiplier;  // (K,)
  double* total;       // (1,)
  double* violation;   // (K,)
  double* estimate;    // (R,)
  double* stderr_;     // (R,); `stderr` is a macro of the C library
  double* state;       // (R, width), may not overlap Problem::state
};

// Adds up the rewards that are present, row after row, into sums (R,).
void reward_sums(const double* rewards, int64_t sequences, int64_t reward_count, Sums* sums);

// The same bits as reference.barrier_weights: every sum and product in its order, none fused.
void barrier_weights(const Problem& problem, const Sums* sums, const Result& result);

}  // namespace l3m::cpu
