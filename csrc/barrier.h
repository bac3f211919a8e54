// From sums of rewards to weights, a reward, a constraint and a response at a time, once for C++ and CUDA C++.
// (arXiv 2410.21533; the derivation is in l3m_kernels/reference.py) Every sum and product is in the reference's order;
// compile without contraction to fused multiply-adds, and the bits are the reference's.
#pragma once

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define L3M_HOST_DEVICE __host__ __device__
#else
#define L3M_HOST_DEVICE
#endif

namespace l3m {

// A row of the moving averages' state, in the order of reference.STATE.
struct Average {
  double weight, estimate, squares, dof, spread;
};

// A row of the sums over a batch, in the order of reference.reward_sums.
struct Sums {
  double count, total, squares;
};

// A row of the table of constraints, in the order of reference.BOUNDS.
struct Bound {
  double sign, bound, scale, margin, margin_stderrs, margin_max;
};

// The rows are read in place from the memory of float64 tensors.
static_assert(sizeof(Average) == 5 * sizeof(double));
static_assert(sizeof(Sums) == 3 * sizeof(double));
static_assert(sizeof(Bound) == 6 * sizeof(double));

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kSmallest = std::numeric_limits<double>::min();
constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// torch's clamp(min=) and minimum: a NaN stays NaN.
L3M_HOST_DEVICE inline double clamp_min(double x, double low) { return x < low ? low : x; }
L3M_HOST_DEVICE inline double minimum(double a, double b) { return a != a || a < b ? a : b; }

// lambda = B'(z): mu / slack while the slack -z is at least s, linear in the violation beyond.
// The quotients stay apart: 1 / s^2 overflows first.
L3M_HOST_DEVICE inline double barrier_multiplier(double z, double mu, double s) {
  return z <= -s ? mu / -z : (mu / s) * ((z + 2.0 * s) / s);
}

// One more response; a missing reward is NaN.
L3M_HOST_DEVICE inline void add_reward(Sums& sums, double reward) {
  if (reward != reward) return;
  sums.count += 1.0;
  sums.total += reward;
  sums.squares += reward * reward;
}

L3M_HOST_DEVICE inline double mean_square(const Sums& sums) { return sums.squares / clamp_min(sums.count, 1.0); }

// One step of the bias-corrected moving averages.
L3M_HOST_DEVICE inline Average advance(const Average& old, const Sums& sums, double smoothing) {
  if (!(sums.count > 0.0)) return old;
  const double keep = 1.0 - smoothing;
  const double n = clamp_min(sums.count, 1.0);
  const double mean = sums.total / n;
  const double weight = keep * old.weight + smoothing;
  const double rate = smoothing / weight;
  const double step = mean - old.estimate;
  double within = 0.0;
  double dof = clamp_min(sums.count - 1.0, 0.0);
  if (sums.count == 1.0 && old.weight > 0.0) {
    within = step * step * (1.0 - rate);
    dof = 1.0;
  } else if (sums.count > 1.0) {
    within = clamp_min(sums.squares - sums.total * mean, 0.0);
  }
  return {weight, old.estimate + rate * step, keep * old.squares + smoothing * within, keep * old.dof + smoothing * dof,
          keep * keep * old.spread + smoothing * smoothing / n};
}

// The square of the estimate's standard error times the weight.
L3M_HOST_DEVICE inline double scaled_variance(const Average& average) {
  const double variance = average.squares / clamp_min(average.dof, kSmallest);
  return variance * average.spread;
}

// root: of `scaled_variance`
L3M_HOST_DEVICE inline double standard_error(const Average& average, double root) {
  return average.weight > 0.0 && average.dof > 0.0 ? root / average.weight : kInfinity;
}

// C_k, scaled, with the margin of a number of standard errors.
L3M_HOST_DEVICE inline double violation(const Bound& bound, double estimate, double error) {
  const double noise = error == kInfinity || error == -kInfinity ? 0.0 : error;
  const double margin = minimum(bound.margin + bound.margin_stderrs * noise, bound.margin_max);
  return (bound.sign * (estimate - bound.bound) + margin) / bound.scale;
}

// What a constraint of multiplier lambda makes of an advantage, S the sum of the multipliers.
L3M_HOST_DEVICE inline double weight_factor(const Bound& bound, double multiplier, double total) {
  return -(multiplier / total) * bound.sign / bound.scale;
}

// An empty response has no token to make likelier.
L3M_HOST_DEVICE inline float normalised(double weight, double norm) {
  return norm == 0.0 ? 0.0f : static_cast<float>(weight / norm);
}

// How far a response's reward is from the baseline, per response of the batch.
struct Advantage {
  double count, baseline, correction, rounding;

  L3M_HOST_DEVICE static Advantage of(const Sums& sums, double root_mean_square, double estimate, bool leave_one_out) {
    const double count = clamp_min(sums.count, 1.0);
    // r - mean of the others = (r - mean) n / (n - 1)
    const double others = sums.count > 1.0 ? sums.count / clamp_min(sums.count - 1.0, 1.0) : 0.0;
    return {count, leave_one_out ? sums.total / count : estimate, leave_one_out ? others : 1.0,
            sums.count * kEpsilon * root_mean_square};
  }

  L3M_HOST_DEVICE double operator()(double reward) const {
    const double difference = reward - baseline;
    const double distance = difference < 0.0 ? -difference : difference;
    // A missing reward is NaN and compares false.
    return (distance > rounding ? difference : 0.0) * correction / count;
  }
};

}  // namespace l3m
