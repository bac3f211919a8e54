// Registers the native ops with torch. The public contract (checks of values, fakes, autograd) is l3m_kernels/ops.py;
// what is checked here is what keeps memory access in bounds.
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include "barrier_tensors.h"
#include "cpu/barrier_weights.h"

namespace l3m {
namespace {

using at::Tensor;

void square_root(double* values, int64_t count) { at::from_blob(values, {count}, at::kDouble).sqrt_(); }

BarrierOutputs barrier_weights(const Tensor& rewards, const Tensor& norm, const std::optional<Tensor>& sums,
                               const Tensor& state, const Tensor& reward_index, const Tensor& bounds, const Tensor& mu,
                               const Tensor& s, std::optional<double> smoothing, bool leave_one_out) {
  BarrierTensors t(rewards, norm, sums, state, reward_index, bounds, mu, s, smoothing);
  const int64_t* index = t.reward_index.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < t.K; ++k) {
    TORCH_CHECK_INDEX(0 <= index[k] && index[k] < t.R, "barrier_weights: reward_index[", k, "] must be in [0, ", t.R,
                      "), got ", index[k]);
  }
  if (!sums) {
    t.sums = at::empty({t.R, 3}, t.rewards.options());
    cpu::reward_sums(t.rewards.const_data_ptr<double>(), t.N, t.R, rows<Sums>(t.sums));
  }
  const cpu::Problem problem{
      .sequences = t.N,
      .reward_count = t.R,
      .constraints = t.K,
      .rewards = t.rewards.const_data_ptr<double>(),
      .norm = t.norm.const_data_ptr<double>(),
      .state = t.state.const_data_ptr<double>(),
      .width = t.W,
      .reward_index = index,
      .bounds = rows<Bound>(t.bounds),
      .mu = *t.mu.const_data_ptr<double>(),
      .s = *t.s.const_data_ptr<double>(),
      .smoothing = smoothing.value_or(0.0),
      .leave_one_out = leave_one_out,
      .square_root = &square_root,
  };
  const cpu::Result result{
      .seq_weight = t.seq_weight.data_ptr<float>(),
      .multiplier = t.multiplier.data_ptr<double>(),
      .total = t.total.data_ptr<double>(),
      .violation = t.violation.data_ptr<double>(),
      .estimate = t.estimate.data_ptr<double>(),
      .stderr_ = t.standard_error.data_ptr<double>(),
      .state = t.new_state.data_ptr<double>(),
  };
  cpu::barrier_weights(problem, rows<Sums>(t.sums), result);
  return t.outputs();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(l3m_kernels, m) { m.def("cpp" L3M_BARRIER_WEIGHTS); }

TORCH_LIBRARY_IMPL(l3m_kernels, CPU, m) { m.impl("cpp_barrier_weights", &barrier_weights); }

}  // namespace l3m
