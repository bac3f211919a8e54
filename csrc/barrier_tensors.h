// For every native backend: the tensors of barrier_weights, checked so that memory access is in bounds, and what it
// returns.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>

#include "trend.h"

// Arguments and results of the op, for its schema.
#define L3M_BARRIER_WEIGHTS                                                                                         \
  "_barrier_weights(Tensor rewards, Tensor norm, Tensor? sums, Tensor state, Tensor reward_index, Tensor bounds, "  \
  "Tensor mu, Tensor s, float? smoothing, bool leave_one_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, " \
  "Tensor)"

namespace l3m {

// The row struct whose fields are a matrix's columns.
template <typename Row>
Row* rows(const at::Tensor& matrix) {
  return reinterpret_cast<Row*>(matrix.data_ptr<double>());
}

inline at::Tensor checked(const char* name, const at::Tensor& tensor, at::Device device, at::ScalarType dtype,
                          at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "barrier_weights: ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "barrier_weights: ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  TORCH_CHECK_VALUE(tensor.device() == device, "barrier_weights: ", name, " must be on ", device, ", got ",
                    tensor.device());
  return tensor.contiguous();
}

using BarrierOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Letters: N sequences, R rewards, K constraints, W columns of a reward's state: those of a moving average, or with no
// smoothing those of the filter.
struct BarrierTensors {
  int64_t N, R, K, W;
  at::Tensor rewards, norm, sums, state, reward_index, bounds, mu, s;  // contiguous; sums undefined where not given
  at::Tensor seq_weight, multiplier, total, violation, estimate, standard_error, new_state;

  BarrierTensors(const at::Tensor& rewards_, const at::Tensor& norm_, const std::optional<at::Tensor>& sums_,
                 const at::Tensor& state_, const at::Tensor& reward_index_, const at::Tensor& bounds_,
                 const at::Tensor& mu_, const at::Tensor& s_, std::optional<double> smoothing) {
    TORCH_CHECK_VALUE(rewards_.dim() == 2, "barrier_weights: rewards must have shape (N, R), got ", rewards_.sizes());
    N = rewards_.size(0), R = rewards_.size(1), K = reward_index_.numel();
    W = (smoothing ? sizeof(Average) : sizeof(Trend)) / sizeof(double);
    const at::Device device = rewards_.device();
    rewards = checked("rewards", rewards_, device, at::kDouble, {N, R});
    norm = checked("norm", norm_, device, at::kDouble, {N});
    if (sums_) sums = checked("sums", *sums_, device, at::kDouble, {R, 3});
    state = checked("state", state_, device, at::kDouble, {R, W});
    reward_index = checked("reward_index", reward_index_, device, at::kLong, {K});
    bounds = checked("bounds", bounds_, device, at::kDouble, {K, 6});
    mu = checked("mu", mu_, device, at::kDouble, {});
    s = checked("s", s_, device, at::kDouble, {});

    const auto options = rewards.options();
    seq_weight = at::empty({N}, options.dtype(at::kFloat));
    multiplier = at::empty({K}, options);
    total = at::empty({}, options);
    violation = at::empty({K}, options);
    estimate = at::empty({R}, options);
    standard_error = at::empty({R}, options);
    new_state = at::empty({R, W}, options);
  }

  BarrierOutputs outputs() const {
    return {seq_weight, multiplier, total, violation, estimate, standard_error, new_state};
  }
};

}  // namespace l3m
