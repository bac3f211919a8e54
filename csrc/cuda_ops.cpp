// Registers the CUDA kernels with torch: checks what keeps memory access in bounds, and launches on the current stream
// of the tensors' device. Nothing here waits for the device.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#include "barrier_tensors.h"
#include "cuda/barrier_weights.h"
#include "cuda/scale.h"
#include "cuda/softmax_gradient.h"

namespace l3m {
namespace {

using at::Tensor;

cuda::Dtype dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return cuda::Dtype::fp32;
    case at::kBFloat16:
      return cuda::Dtype::bf16;
    case at::kHalf:
      return cuda::Dtype::fp16;
    default:
      TORCH_CHECK_TYPE(false, "l3m_kernels: must be float32, bfloat16 or float16, got ", type);
  }
}

void check(const char* name, const Tensor& tensor, const Tensor& logits, at::ScalarType dtype, int64_t size) {
  TORCH_CHECK_VALUE(tensor.device() == logits.device(), "softmax_gradient: ", name, " must be on ", logits.device(),
                    ", got ", tensor.device());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "softmax_gradient: ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == size && tensor.is_contiguous(), "softmax_gradient: ", name,
                    " must be contiguous, of shape [", size, "], got ", tensor.sizes(), " with strides ",
                    tensor.strides());
}

// Asked for at each call, so that one process can measure both.
cuda::RowKernel row_kernel() {
  const char* name = std::getenv("L3M_ROW_KERNEL");
  cuda::RowKernel kernel;
  TORCH_CHECK_VALUE(cuda::row_kernel_named(name, kernel), "L3M_ROW_KERNEL must be auto, two_pass or cluster, got '",
                    name, "'");
  return kernel;
}

// The signature of row_chunks.RowKernels.softmax_gradient.
void softmax_gradient(const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& upstream,
                      const std::optional<Tensor>& bias, double softcap, double inverse_temperature,
                      at::ScalarType grad_dtype, const std::optional<Tensor>& token, const Tensor& lse,
                      const Tensor& flag, bool known_lse, const std::optional<Tensor>& gradient) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.scalar_type() == at::kFloat, "softmax_gradient: logits must be (n, V) ",
                    "float32, got ", logits.sizes(), " ", logits.scalar_type());
  const int64_t n = logits.size(0), V = logits.size(1);
  TORCH_CHECK_VALUE(V > 0 && (V == 1 || logits.stride(1) == 1) && (n < 2 || logits.stride(0) >= V),
                    "softmax_gradient: rows of logits must be contiguous, got strides ", logits.strides());
  check("targets", targets, logits, at::kLong, n);
  check("lse", lse, logits, at::kFloat, n);
  check("flag", flag, logits, at::kInt, 1);
  TORCH_CHECK_VALUE(token || known_lse, "softmax_gradient: token is wanted where lse is not known");
  if (token) check("token", *token, logits, at::kFloat, n);
  if (upstream) check("upstream", *upstream, logits, at::kFloat, n);
  if (bias) check("bias", *bias, logits, bias->scalar_type(), V);
  if (gradient) {
    TORCH_CHECK_VALUE(upstream && gradient->device() == logits.device() && gradient->scalar_type() == grad_dtype &&
                          gradient->sizes() == logits.sizes() && (V == 1 || gradient->stride(1) == 1) &&
                          (n < 2 || gradient->stride(0) >= V),
                      "softmax_gradient: gradient must be ", logits.sizes(), " ", grad_dtype, " on ", logits.device(),
                      " with contiguous rows, and wants upstream, got ", gradient->sizes(), " with strides ",
                      gradient->strides(), " ", gradient->scalar_type(), " on ", gradient->device());
  }

  const c10::cuda::CUDAGuard guard(logits.device());
  const cuda::SoftmaxGradient arguments{
      .logits = logits.data_ptr<float>(),
      .stride = std::max(logits.stride(0), V),  // of a single row it may be anything
      .rows = n,
      .vocabulary = V,
      .target = targets.const_data_ptr<int64_t>(),
      .upstream = upstream ? upstream->const_data_ptr<float>() : nullptr,
      .bias = bias ? bias->const_data_ptr() : nullptr,
      .bias_dtype = bias ? dtype_of(bias->scalar_type()) : cuda::Dtype::none,
      .gradient = upstream ? dtype_of(grad_dtype) : cuda::Dtype::none,
      .softcap = static_cast<float>(softcap),
      .inverse_temperature = static_cast<float>(inverse_temperature),
      .known_lse = known_lse,
      .token = token && !known_lse ? token->data_ptr<float>() : nullptr,
      .lse = lse.data_ptr<float>(),
      .flag = flag.data_ptr<int32_t>(),
      .out = gradient ? gradient->data_ptr() : nullptr,
      .out_stride = gradient ? std::max(gradient->stride(0), V) : 0,
  };
  const cuda::RowKernel kernel = row_kernel();
  if (kernel == cuda::RowKernel::cluster && n > 0 && !known_lse) {
    const char* obstacle = cuda::cluster_obstacle(arguments);
    TORCH_CHECK_VALUE(obstacle == nullptr, "L3M_ROW_KERNEL=cluster: ", obstacle, "; L3M_ROW_KERNEL=two_pass takes it");
  }
  C10_CUDA_CHECK(cuda::softmax_gradient(arguments, c10::cuda::getCurrentCUDAStream(), kernel));
}

// out (m, n) = a (m, k) @ b (k, n), or += it, of fp32 in fp32 in this thread, whatever the process allows. The guard holds
// where torch asks cuBLAS, not cuBLASLt: l3m_kernels/products.py looks for that.
void product(const Tensor& a, const Tensor& b, const Tensor& out, bool accumulate) {
  TORCH_CHECK_TYPE(a.scalar_type() == at::kFloat, "product: a must be float32, got ", a.scalar_type());
  const c10::cuda::CUDAGuard guard(a.device());
  const at::NoTF32Guard exact;
  Tensor result = out;
  if (accumulate) {
    at::addmm_out(result, out, a, b);
  } else {
    at::mm_out(result, a, b);
  }
}

// values *= factor, a number on the device, where that is not 1.
void scale(const Tensor& values, const Tensor& factor) {
  TORCH_CHECK_VALUE(values.is_contiguous(), "scale: values must be contiguous, got strides ", values.strides());
  TORCH_CHECK_VALUE(factor.numel() == 1 && factor.scalar_type() == at::kFloat && factor.device() == values.device(),
                    "scale: factor must be one float32 on ", values.device(), ", got ", factor.sizes(), " ",
                    factor.scalar_type(), " on ", factor.device());
  constexpr int kBlocks = 1024;  // more than run at once, so that the last ones are even
  const c10::cuda::CUDAGuard guard(values.device());
  C10_CUDA_CHECK(cuda::scale(values.data_ptr(), dtype_of(values.scalar_type()), values.numel(),
                             factor.const_data_ptr<float>(), kBlocks, c10::cuda::getCurrentCUDAStream()));
}

BarrierOutputs barrier_weights(const Tensor& rewards, const Tensor& norm, const std::optional<Tensor>& sums,
                               const Tensor& state, const Tensor& reward_index, const Tensor& bounds, const Tensor& mu,
                               const Tensor& s, std::optional<double> smoothing, bool leave_one_out) {
  const c10::cuda::CUDAGuard guard(rewards.device());
  const BarrierTensors t(rewards, norm, sums, state, reward_index, bounds, mu, s, smoothing);
  const Tensor scratch = at::empty({4 * t.R + t.K}, t.rewards.options());
  static_assert(sizeof(Advantage) == 4 * sizeof(double));
  const cuda::BarrierWeights arguments{
      .sequences = t.N,
      .reward_count = t.R,
      .constraints = t.K,
      .rewards = t.rewards.const_data_ptr<double>(),
      .norm = t.norm.const_data_ptr<double>(),
      .sums = sums ? rows<Sums>(t.sums) : nullptr,
      .state = t.state.const_data_ptr<double>(),
      .width = t.W,
      .reward_index = t.reward_index.const_data_ptr<int64_t>(),
      .bounds = rows<Bound>(t.bounds),
      .mu = t.mu.const_data_ptr<double>(),
      .s = t.s.const_data_ptr<double>(),
      .smoothing = smoothing.value_or(0.0),
      .leave_one_out = leave_one_out,
      .advantages = rows<Advantage>(scratch),
      .factors = scratch.data_ptr<double>() + 4 * t.R,
      .seq_weight = t.seq_weight.data_ptr<float>(),
      .multiplier = t.multiplier.data_ptr<double>(),
      .total = t.total.data_ptr<double>(),
      .violation = t.violation.data_ptr<double>(),
      .estimate = t.estimate.data_ptr<double>(),
      .stderr_ = t.standard_error.data_ptr<double>(),
      .new_state = t.new_state.data_ptr<double>(),
  };
  C10_CUDA_CHECK(cuda::barrier_weights(arguments, c10::cuda::getCurrentCUDAStream()));
  return t.outputs();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(l3m_kernels, m) {
  m.def(
      "cuda_softmax_gradient(Tensor(a!) logits, Tensor targets, Tensor? upstream, Tensor? bias, float softcap, float "
      "inverse_temperature, ScalarType grad_dtype, Tensor(b!)? token, Tensor(c!) lse, Tensor(d!) flag, bool known_lse, "
      "Tensor(e!)? gradient=None) -> ()");
  m.def("cuda_product(Tensor a, Tensor b, Tensor(a!) out, bool accumulate) -> ()");
  m.def("cuda_scale(Tensor(a!) values, Tensor factor) -> ()");
  m.def("cuda" L3M_BARRIER_WEIGHTS);
}

TORCH_LIBRARY_IMPL(l3m_kernels, CUDA, m) {
  m.impl("cuda_softmax_gradient", &softmax_gradient);
  m.impl("cuda_product", &product);
  m.impl("cuda_scale", &scale);
  m.impl("cuda_barrier_weights", &barrier_weights);
}

}  // namespace l3m
