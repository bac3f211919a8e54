// Registers the native ops with torch. The public contract (checks of values, fakes, autograd) is l3m_kernels/ops.py;
// what is checked here is what keeps memory access in bounds.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cpu/barrier_weights.h"

namespace l3m {
namespace {

using at::Tensor;

Tensor checked(const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "barrier_weights: ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, "barrier_weights: ", name, " must have shape ", shape, ", got ",
                    tensor.sizes());
  return tensor.contiguous();
}

// The row struct whose fields are a matrix's columns.
template <typename Row>
Row* rows(const Tensor& matrix) {
  return reinterpret_cast<Row*>(matrix.data_ptr<double>());
}

void square_root(double* values, int64_t count) { at::from_blob(values, {count}, at::kDouble).sqrt_(); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> barrier_weights(
    const Tensor& rewards, const Tensor& norm, const std::optional<Tensor>& sums, const Tensor& state,
    const Tensor& reward_index, const Tensor& bounds, const Tensor& mu, const Tensor& s, double smoothing,
    bool leave_one_out) {
  TORCH_CHECK_VALUE(rewards.dim() == 2, "barrier_weights: rewards must have shape (N, R), got ", rewards.sizes());
  const int64_t N = rewards.size(0), R = rewards.size(1), K = reward_index.numel();
  const Tensor rewards_ = checked("rewards", rewards, at::kDouble, {N, R});
  const Tensor norm_ = checked("norm", norm, at::kDouble, {N});
  const Tensor state_ = checked("state", state, at::kDouble, {R, 5});
  const Tensor index_ = checked("reward_index", reward_index, at::kLong, {K});
  const Tensor bounds_ = checked("bounds", bounds, at::kDouble, {K, 6});
  const double mu_ = *checked("mu", mu, at::kDouble, {}).const_data_ptr<double>();
  const double s_ = *checked("s", s, at::kDouble, {}).const_data_ptr<double>();
  const int64_t* index = index_.const_data_ptr<int64_t>();
  for (int64_t k = 0; k < K; ++k) {
    TORCH_CHECK_INDEX(0 <= index[k] && index[k] < R, "barrier_weights: reward_index[", k, "] must be in [0, ", R,
                      "), got ", index[k]);
  }

  const auto options = rewards.options();
  Tensor sums_;
  if (sums) {
    sums_ = checked("sums", *sums, at::kDouble, {R, 3});
  } else {
    sums_ = at::empty({R, 3}, options);
    cpu::reward_sums(rewards_.const_data_ptr<double>(), N, R, rows<Sums>(sums_));
  }

  Tensor seq_weight = at::empty({N}, options.dtype(at::kFloat));
  Tensor multiplier = at::empty({K}, options);
  Tensor total = at::empty({}, options);
  Tensor violation = at::empty({K}, options);
  Tensor estimate = at::empty({R}, options);
  Tensor standard_error = at::empty({R}, options);
  Tensor new_state = at::empty({R, 5}, options);
  const cpu::Problem problem{
      .sequences = N,
      .reward_count = R,
      .constraints = K,
      .rewards = rewards_.const_data_ptr<double>(),
      .norm = norm_.const_data_ptr<double>(),
      .state = rows<Average>(state_),
      .reward_index = index,
      .bounds = rows<Bound>(bounds_),
      .mu = mu_,
      .s = s_,
      .smoothing = smoothing,
      .leave_one_out = leave_one_out,
      .square_root = &square_root,
  };
  const cpu::Result result{
      .seq_weight = seq_weight.data_ptr<float>(),
      .multiplier = multiplier.data_ptr<double>(),
      .total = total.data_ptr<double>(),
      .violation = violation.data_ptr<double>(),
      .estimate = estimate.data_ptr<double>(),
      .stderr_ = standard_error.data_ptr<double>(),
      .state = rows<Average>(new_state),
  };
  cpu::barrier_weights(problem, rows<Sums>(sums_), result);
  return {seq_weight, multiplier, total, violation, estimate, standard_error, new_state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(l3m_kernels, m) {
  m.def(
      "cpp_barrier_weights(Tensor rewards, Tensor norm, Tensor? sums, Tensor state, Tensor reward_index, Tensor "
      "bounds, Tensor mu, "
      "Tensor s, float smoothing, bool leave_one_out) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(l3m_kernels, CPU, m) { m.impl("cpp_barrier_weights", &barrier_weights); }

}  // namespace l3m
