#include "cpu/barrier_weights.h"

#include <vector>

namespace l3m::cpu {

void reward_sums(const double* rewards, int64_t sequences, int64_t reward_count, Sums* sums) {
  for (int64_t r = 0; r < reward_count; ++r) {
    Sums sum{0.0, 0.0, 0.0};
    for (int64_t n = 0; n < sequences; ++n) {
      add_reward(sum, rewards[n * reward_count + r]);
    }
    sums[r] = sum;
  }
}

void barrier_weights(const Problem& problem, const Sums* sums, const Result& result) {
  const int64_t R = problem.reward_count;
  std::vector<double> root_mean_square(R);
  std::vector<Average> averages(R);
  for (int64_t r = 0; r < R; ++r) {
    averages[r] = advance_row(problem.state + r * problem.width, result.state + r * problem.width, problem.width,
                              sums[r], problem.smoothing);
    result.estimate[r] = averages[r].estimate;
    result.stderr_[r] = scaled_variance(averages[r]);
    root_mean_square[r] = mean_square(sums[r]);
  }
  problem.square_root(result.stderr_, R);
  problem.square_root(root_mean_square.data(), R);
  std::vector<Advantage> advantages;
  advantages.reserve(R);
  for (int64_t r = 0; r < R; ++r) {
    const Average& average = averages[r];
    result.stderr_[r] = standard_error(average, result.stderr_[r]);
    advantages.push_back(Advantage::of(sums[r], root_mean_square[r], average.estimate, problem.leave_one_out));
  }

  double total = 0.0;
  for (int64_t k = 0; k < problem.constraints; ++k) {
    const int64_t r = problem.reward_index[k];
    const bool seen = averages[r].weight > 0.0;
    result.violation[k] = seen ? violation(problem.bounds[k], result.estimate[r], result.stderr_[r]) : kNaN;
    result.multiplier[k] = seen ? barrier_multiplier(result.violation[k], problem.mu, problem.s) : 0.0;
    total += result.multiplier[k];
  }
  total = clamp_min(total, 1.0);
  *result.total = total;

  std::vector<double> factors(problem.constraints);
  for (int64_t k = 0; k < problem.constraints; ++k) {
    factors[k] = weight_factor(problem.bounds[k], result.multiplier[k], total);
  }
  for (int64_t n = 0; n < problem.sequences; ++n) {
    double weight = 0.0;
    for (int64_t k = 0; k < problem.constraints; ++k) {
      const int64_t r = problem.reward_index[k];
      weight += factors[k] * advantages[r](problem.rewards[n * R + r]);
    }
    result.seq_weight[n] = normalised(weight, problem.norm[n]);
  }
}

}  // namespace l3m::cpu
