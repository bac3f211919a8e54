// What the tests call: the launchers of csrc/cuda on memory of the host.
#include "cuda/barrier_weights.h"
#include "cuda/scale.h"
#include "cuda/softmax_gradient.h"

using namespace l3m;

extern "C" {

void set_order(unsigned seed) {
  on_host::order.seed(seed);
  on_host::largest_grid = seed % 3 == 0 ? 2 : 1u << 31;
}

// What the device is: whether it has clusters, and the architecture that the kernels were compiled for.
void set_device(int clusters, int code) {
  on_host::has_clusters = clusters;
  on_host::code_of = code;
}

// -1: there is no such kernel; 0 two_pass, 1 cluster, 2 automatic
int row_kernel(const char* name) {
  cuda::RowKernel kernel;
  return cuda::row_kernel_named(name, kernel) ? static_cast<int>(kernel) : -1;
}

const char* cluster_obstacle(const float* logits, int64_t stride, int64_t rows, int64_t vocabulary) {
  cuda::SoftmaxGradient arguments{};
  arguments.logits = const_cast<float*>(logits);
  arguments.stride = stride, arguments.rows = rows, arguments.vocabulary = vocabulary;
  return cuda::cluster_obstacle(arguments);
}

// dtypes: 0 none, 1 fp32, 2 bf16, 3 fp16
int softmax_gradient(float* logits, int64_t stride, int64_t rows, int64_t vocabulary, const int64_t* target,
                     const float* upstream, const void* bias, int bias_dtype, int gradient, float softcap,
                     float inverse_temperature, int known_lse, float* token, float* lse, int32_t* flag, int kernel,
                     void* out, int64_t out_stride) {
  return cuda::softmax_gradient(
      {logits, stride, rows, vocabulary, target, upstream, bias, cuda::Dtype(bias_dtype), cuda::Dtype(gradient),
       softcap, inverse_temperature, known_lse != 0, token, lse, flag, out, out_stride},
      nullptr, cuda::RowKernel(kernel));
}

int scale(void* values, int dtype, int64_t count, const float* factor, int blocks) {
  return cuda::scale(values, cuda::Dtype(dtype), count, factor, blocks, nullptr);
}

int barrier_weights(int64_t sequences, int64_t reward_count, int64_t constraints, const double* rewards,
                    const double* norm, const Sums* sums, const double* state, const int64_t* reward_index,
                    const Bound* bounds, const double* mu, const double* s, int64_t width, double smoothing,
                    int leave_one_out, Advantage* advantages, double* factors, float* seq_weight, double* multiplier,
                    double* total, double* violation, double* estimate, double* standard_error, double* new_state) {
  return cuda::barrier_weights(
      {sequences,      reward_count, constraints, rewards,    norm,  sums,      state,
       width,          reward_index, bounds,      mu,         s,     smoothing, leave_one_out != 0,
       advantages,     factors,      seq_weight,  multiplier, total, violation, estimate,
       standard_error, new_state},
      nullptr);
}
}
