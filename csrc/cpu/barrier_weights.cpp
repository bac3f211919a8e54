#include "cpu/barrier_weights.h"

#include <cmath>
#include <limits>
#include <vector>

#include "barrier.h"

namespace l3m::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// torch's clamp(min=) and minimum: a NaN stays NaN.
double clamp_min(double x, double low) { return x < low ? low : x; }
double minimum(double a, double b) { return std::isnan(a) || a < b ? a : b; }

Average advance(const Average& old, const Sums& sums, double smoothing) {
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
double scaled_variance(const Average& average) {
  const double variance = average.squares / clamp_min(average.dof, std::numeric_limits<double>::min());
  return variance * average.spread;
}

// C_k, scaled, with the margin of a number of standard errors.
double violation(const Bound& bound, double estimate, double error) {
  const double noise = std::isinf(error) ? 0.0 : error;
  const double margin = minimum(bound.margin + bound.margin_stderrs * noise, bound.margin_max);
  return (bound.sign * (estimate - bound.bound) + margin) / bound.scale;
}

// How far a response's reward is from the baseline, per response of the batch.
class Advantage {
 public:
  Advantage(const Sums& sums, double root_mean_square, double estimate, bool leave_one_out)
      : count_(clamp_min(sums.count, 1.0)),
        baseline_(leave_one_out ? sums.total / count_ : estimate),
        correction_(leave_one_out ? others(sums.count) : 1.0),
        rounding_(sums.count * std::numeric_limits<double>::epsilon() * root_mean_square) {}

  double operator()(double reward) const {
    const double difference = reward - baseline_;
    // A missing reward is NaN and compares false.
    return (std::abs(difference) > rounding_ ? difference : 0.0) * correction_ / count_;
  }

 private:
  // r - mean of the others = (r - mean) n / (n - 1)
  static double others(double count) { return count > 1.0 ? count / clamp_min(count - 1.0, 1.0) : 0.0; }

  double count_, baseline_, correction_, rounding_;
};

}  // namespace

void reward_sums(const double* rewards, int64_t sequences, int64_t reward_count, Sums* sums) {
  for (int64_t r = 0; r < reward_count; ++r) {
    Sums sum{0.0, 0.0, 0.0};
    for (int64_t n = 0; n < sequences; ++n) {
      const double reward = rewards[n * reward_count + r];
      if (std::isnan(reward)) continue;
      sum.count += 1.0;
      sum.total += reward;
      sum.squares += reward * reward;
    }
    sums[r] = sum;
  }
}

void barrier_weights(const Problem& problem, const Sums* sums, const Result& result) {
  const int64_t R = problem.reward_count;
  std::vector<double> root_mean_square(R);
  for (int64_t r = 0; r < R; ++r) {
    result.state[r] = advance(problem.state[r], sums[r], problem.smoothing);
    result.estimate[r] = result.state[r].estimate;
    result.stderr_[r] = scaled_variance(result.state[r]);
    root_mean_square[r] = sums[r].squares / clamp_min(sums[r].count, 1.0);
  }
  problem.square_root(result.stderr_, R);
  problem.square_root(root_mean_square.data(), R);
  std::vector<Advantage> advantages;
  advantages.reserve(R);
  for (int64_t r = 0; r < R; ++r) {
    const Average& average = result.state[r];
    const bool known = average.weight > 0.0 && average.dof > 0.0;
    result.stderr_[r] = known ? result.stderr_[r] / average.weight : kInfinity;
    advantages.emplace_back(sums[r], root_mean_square[r], average.estimate, problem.leave_one_out);
  }

  double total = 0.0;
  for (int64_t k = 0; k < problem.constraints; ++k) {
    const int64_t r = problem.reward_index[k];
    const bool seen = result.state[r].weight > 0.0;
    result.violation[k] = seen ? violation(problem.bounds[k], result.estimate[r], result.stderr_[r]) : kNaN;
    result.multiplier[k] = seen ? barrier_multiplier(result.violation[k], problem.mu, problem.s) : 0.0;
    total += result.multiplier[k];
  }
  total = clamp_min(total, 1.0);
  *result.total = total;

  std::vector<double> factors(problem.constraints);
  for (int64_t k = 0; k < problem.constraints; ++k) {
    const Bound& bound = problem.bounds[k];
    factors[k] = -(result.multiplier[k] / total) * bound.sign / bound.scale;
  }
  for (int64_t n = 0; n < problem.sequences; ++n) {
    double weight = 0.0;
    for (int64_t k = 0; k < problem.constraints; ++k) {
      const int64_t r = problem.reward_index[k];
      weight += factors[k] * advantages[r](problem.rewards[n * R + r]);
    }
    const double norm = problem.norm[n];
    result.seq_weight[n] = norm == 0.0 ? 0.0f : static_cast<float>(weight / norm);
  }
}

}  // namespace l3m::cpu
