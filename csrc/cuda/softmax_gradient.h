// Launches of the fused row kernel: raw pointers and a stream, no torch. Letters: n rows, V vocabulary.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

namespace l3m::cuda {

enum class Dtype { none, fp32, bf16, fp16 };

struct SoftmaxGradient {
  float* logits;          // (n, V) products, overwritten by their gradient from each row's beginning unless `out` is
  int64_t stride;         // elements from one row of logits to the next
  int64_t rows;           // n
  int64_t vocabulary;     // V, at most 2^31 - 2^16
  const int64_t* target;  // (n,); one outside [0, V) is never used as an index
  const float* upstream;  // (n,) gradients of the log-likelihoods; null where `gradient` is none
  const void* bias;       // (V,) of dtype bias_dtype; null where that is none
  Dtype bias_dtype;
  Dtype gradient;  // none: statistics alone, logits stay
  float softcap;   // 0: none
  float inverse_temperature;
  // False: token, lse (and flag) are written, and a target outside [0, V) makes its row NaN. True: lse is read, the
  // columns may be a part of the vocabulary, and a target outside is in another part; one pass over the row.
  bool known_lse;
  float* token;        // (n,) log-likelihoods; null with known_lse
  float* lse;          // (n,)
  int32_t* flag;       // (1,) becomes 1 where a target is outside [0, V); null with known_lse
  void* out;           // (n, V) of dtype `gradient`, where it is written; null: over the logits
  int64_t out_stride;  // elements from one row of it to the next
};

// The accesses of four floats are possible.
inline bool aligned(const SoftmaxGradient& a) {
  const auto addresses = reinterpret_cast<uintptr_t>(a.logits) | reinterpret_cast<uintptr_t>(a.out);
  return addresses % 16 == 0 && ((a.stride | a.out_stride) % 4 == 0 || a.rows == 1);
}

enum class RowKernel {
  two_pass,   // any row: reads it twice where it wants statistics and gradient
  cluster,    // reads it once, into the registers of a thread block cluster; with known_lse: the one pass of the other
  automatic,  // cluster for rows of the lengths at which it was measured to be faster, where nothing is in its way
};

// The kernel of that name: `auto`, `two_pass`, `cluster`; null is auto. False: there is none.
inline bool row_kernel_named(const char* name, RowKernel& kernel) {
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  kernel = RowKernel::automatic;
  if (name == nullptr || is("auto")) return true;
  kernel = is("cluster") ? RowKernel::cluster : RowKernel::two_pass;
  return is("cluster") || is("two_pass");
}

// Why the kernel `cluster` cannot take these rows on the current device, in words; null: it can.
const char* cluster_obstacle(const SoftmaxGradient& arguments);

// Queues the kernel on the stream; n = 0 queues nothing. `cluster` where there is an obstacle: cudaErrorNotSupported.
// The same bits for the same kernel, row, V and alignment, whatever else is in the batch.
cudaError_t softmax_gradient(const SoftmaxGradient& arguments, cudaStream_t stream,
                             RowKernel kernel = RowKernel::two_pass);
// Its part for `cluster`, not with known_lse.
cudaError_t softmax_gradient_cluster(const SoftmaxGradient& arguments, cudaStream_t stream);

}  // namespace l3m::cuda
