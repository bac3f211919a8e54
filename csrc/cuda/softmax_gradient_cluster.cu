// Softmax, log-likelihood of the target and gradient of a row of logits, in place or into `out`, each logit read once: a
// thread block cluster holds the row in its registers. Letters: C blocks of a cluster, V vocabulary.
//
// Why overwriting is safe. A 16-bit gradient begins where the row does: element i is written over the fp32 element
// i / 2, which another block of the cluster may hold. Of a row there is one barrier of the whole cluster (`part` is
// read behind it). Every thread arrives there with its logits in registers, and the target's, which thread 0 of each
// block reads from memory: their sum has gone into `part`, so no load is under way, and an arrival releases, a wait
// acquires, so none can be moved behind it. Every store to the row is behind the wait. No other cluster has this row,
// and the gradient ends within the row: 2 V <= 4 V bytes. A row whose target is outside [0, V) is never read.
#include <cooperative_groups.h>

#include "cuda/softmax_gradient.h"
#include "cuda/softmax_gradient_block.h"
#include "cuda/softmax_row.h"

namespace l3m::cuda {
namespace {

constexpr int kMostBlocks = 8;    // the most that any device with clusters takes
constexpr int kMostVectors = 16;  // of four columns, in a thread's registers; with 8 or 10 two blocks may share a
                                  // multiprocessor: one loads while the other waits
constexpr int64_t kMostColumns = int64_t{kMostBlocks} * kMostThreads * kMostVectors * kWidth;

constexpr int64_t kMostRows = ((int64_t{1} << 31) - 1) / kMostBlocks;  // a cluster each

using row::Statistics;
using row::Sum;
using row::Transform;
using row::Value;

// The columns of a warp are neighbours, kVectors times kSpan; a lane has four of each span: addresses differ by
// constants.
constexpr int kSpan = kWarp * kWidth;

// What a thread knows of its columns, relative to its first.
struct Held {
  int inside;  // columns of the row from the first on; not above 0: the thread has none
  int target;  // where the target is, its own or not

  template <int kVectors>
  __device__ bool all() const {
    return inside >= (kVectors - 1) * kSpan + kWidth;
  }
  template <int kVectors>
  __device__ bool has_target() const {
    return 0 <= target && target < kVectors * kSpan && target % kSpan < kWidth;
  }
};

// -inf outside the row. `logits`: from the thread's first column on.
template <int kVectors>
__device__ void load(const float* logits, const Held& held, float (&x)[kVectors][kWidth]) {
  if (held.all<kVectors>()) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) load_four(logits + v * kSpan, x[v]);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      x[v][e] = v * kSpan + e < held.inside ? logits[v * kSpan + e] : row::kMinusInfinity;
    }
  }
}

// `bias`: from the thread's first column on.
template <int kVectors, typename Bias>
__device__ void add(const Bias* bias, const Held& held, float (&x)[kVectors][kWidth]) {
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (v * kSpan + e < held.inside) x[v][e] += to_float(bias[v * kSpan + e]);
    }
  }
}

// Without a softcap: the sum over a thread's columns but the target; x becomes exp(z - origin(its maximum)), so that no
// element needs a second exponential. Where x is not needed afterwards, the compiler would fuse its last product into
// the sum: other bits than with a gradient. These intrinsics are never fused.
template <int kVectors>
__device__ Sum exponentials(const Held& held, float inverse_temperature, float (&x)[kVectors][kWidth]) {
  Sum sum{row::kMinusInfinity, 0.0f};
  if (held.has_target<kVectors>()) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) x[v][e] = v * kSpan + e == held.target ? row::kMinusInfinity : x[v][e];
    }
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      x[v][e] = __fmul_rn(x[v][e], inverse_temperature);
      sum.maximum = fmaxf(sum.maximum, x[v][e]);
    }
  }
  const float zero = row::origin(sum.maximum);
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      x[v][e] = expf(x[v][e] - zero);
      sum.total = __fadd_rn(sum.total, x[v][e]);
    }
  }
  return sum;
}

// With one: its derivative cannot be had from the exponential, so x stays.
template <int kVectors>
__device__ Sum others(const Held& held, const Transform& transform, const float (&x)[kVectors][kWidth]) {
  Sum sum{row::kMinusInfinity, 0.0f};
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float z[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const bool counts = v * kSpan + e < held.inside && v * kSpan + e != held.target;
      z[e] = counts ? row::transform(x[v][e], transform).z : row::kMinusInfinity;
    }
    sum.add(z);
  }
  return sum;
}

// `out`: from the thread's first column on.
template <typename Gradient>
__device__ void store(Gradient* out, const Held& held, int v, const float (&g)[kWidth]) {
  if (v * kSpan + kWidth <= held.inside) {
    store_four(out + v * kSpan, g);
    return;
  }
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    if (v * kSpan + e < held.inside) out[v * kSpan + e] = of_float<Gradient>(g[e]);
  }
}

template <int kVectors, typename Gradient>
__device__ void fill(Gradient* out, const Held& held, float value) {
  const float g[kWidth] = {value, value, value, value};
#pragma unroll 1
  for (int v = 0; v < kVectors; ++v) store(out, held, v, g);
}

// What the threads of a block have to know of the whole row.
struct Shared {
  Statistics row;
  float at_target;  // the gradient there
};

// Of a thread's 128 registers, or of 64 where two blocks are to share a multiprocessor: what is more than these spills.
constexpr bool two_fit(int vectors, bool fp32_gradient) { return vectors <= (fp32_gradient ? 8 : 10); }

// kExtras: a bias, or a softcap. kGradient: whether there is one; Gradient is then its type.
template <int kVectors, bool kExtras, bool kGradient, typename Gradient>
__global__ void __launch_bounds__(kMostThreads, two_fit(kVectors, kGradient && sizeof(Gradient) == 4) ? 2 : 1)
    softmax_cluster_kernel(SoftmaxGradient a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ Sum warps[kMostThreads / kWarp];
  __shared__ Sum part;   // of this block; the others read it
  __shared__ Value own;  // the target's
  __shared__ Shared found;
  const auto cluster = cooperative_groups::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = rank * static_cast<int>(blockDim.x / kWarp) + thread / kWarp;
  const int first = warp * kVectors * kSpan + thread % kWarp * kWidth, vocabulary = static_cast<int>(a.vocabulary);
  const bool capped = kExtras && a.softcap != 0.0f;
  const Transform transform{kExtras ? a.softcap : 0.0f, capped ? 1.0f / a.softcap : 0.0f, a.inverse_temperature};
  const int64_t r = blockIdx.x / blocks;
  const int64_t wanted = a.target[r];
  float* logits = a.logits + r * a.stride;
  Gradient* out = gradient_of<Gradient>(a, r);
  const float scale = kGradient ? a.upstream[r] * a.inverse_temperature : 0.0f;
  if (wanted < 0 || wanted >= a.vocabulary) {
    if (rank == 0 && thread == 0) {
      *a.flag = 1;  // every cluster that writes it writes this
      a.token[r] = a.lse[r] = NAN;
    }
    if (kGradient) fill<kVectors>(out + first, {vocabulary - first, 0}, scale == 0.0f ? 0.0f : NAN);
    return;
  }
  const int target = static_cast<int>(wanted);
  const Held held{vocabulary - first, target - first};
  float x[kVectors][kWidth];
  load(logits + first, held, x);
  if (thread == 0) {
    float logit = logits[target];
    if (kExtras) with_bias(a, [&](auto bias) { logit += to_float(bias[target]); });
    own = row::transform(logit, transform);
  }
  if (kExtras) with_bias(a, [&](auto bias) { add(bias + first, held, x); });
  const Sum sum = capped ? others(held, transform, x) : exponentials(held, a.inverse_temperature, x);
  const Sum whole = sum_of_block(sum, warps);
  if (thread == 0) part = whole;
  cluster.sync();
  if (thread < kWarp) {
    const Sum one = thread < blocks ? *cluster.map_shared_rank(&part, thread) : Sum{row::kMinusInfinity, 0.0f};
    const Sum all = sum_of_warp(one);
    if (thread == 0) {
      found.row = row::statistics(all, own.z);
      found.at_target = row::target_gradient(found.row.complement, own.slope, scale);
      if (rank == 0) {
        a.token[r] = found.row.token;
        a.lse[r] = found.row.lse;
      }
    }
  }
  __syncthreads();
  const Statistics statistics = found.row;
  // No block ends while another reads its shared memory; the stores hide the wait.
  cluster.barrier_arrive();
  if (kGradient && scale == 0.0f) {
    fill<kVectors>(out + first, held, 0.0f);
  } else if (kGradient) {
    const float factor = -scale * (expf(sum.maximum - statistics.zero) * statistics.reciprocal);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        x[v][e] = capped ? row::gradient(row::transform(x[v][e], transform), statistics, scale) : x[v][e] * factor;
      }
      store(out + first, held, v, x[v]);
    }
    // over what this very thread has written there
    if (held.has_target<kVectors>()) (out + first)[held.target] = of_float<Gradient>(found.at_target);
  }
  cluster.barrier_wait();
#else
  __trap();  // never launched: cluster_obstacle
#endif
}

template <int kVectors, bool kExtras, bool kGradient, typename Gradient>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  constexpr int kColumns = kVectors * kSpan;  // of a warp
  const auto warps = static_cast<int>((a.vocabulary - 1) / kColumns + 1);
  unsigned blocks = 1;  // a power of 2; each has about as many warps
  while (blocks * (kMostThreads / kWarp) < static_cast<unsigned>(warps)) blocks *= 2;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(a.rows) * blocks;
  config.blockDim.x = ((warps - 1) / blocks + 1) * kWarp;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, softmax_cluster_kernel<kVectors, kExtras, kGradient, Gradient>, a);
}

template <int kVectors, bool kExtras>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  switch (a.gradient) {
    case Dtype::fp32:
      return launch<kVectors, kExtras, true, float>(a, stream);
    case Dtype::bf16:
      return launch<kVectors, kExtras, true, __nv_bfloat16>(a, stream);
    case Dtype::fp16:
      return launch<kVectors, kExtras, true, __half>(a, stream);
    default:
      return launch<kVectors, kExtras, false, float>(a, stream);
  }
}

template <int kVectors>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  const bool extras = a.bias_dtype != Dtype::none || a.softcap != 0.0f;
  return extras ? launch<kVectors, true>(a, stream) : launch<kVectors, false>(a, stream);
}

}  // namespace

const char* cluster_obstacle(const SoftmaxGradient& a) {
  int device = 0, clusters = 0;
  cudaFuncAttributes code{};
  if (a.vocabulary > kMostColumns) return "a row has more columns than the 262144 that a cluster's registers hold";
  if (a.rows > kMostRows) return "there are more than 268435455 rows";
  if (!aligned(a)) return "rows of logits do not begin at multiples of 16 bytes";
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device) != cudaSuccess || clusters == 0) {
    return "this GPU has no thread block clusters, which came with compute capability 9.0";
  }
  // Code for 8.0 that the driver compiled for this GPU, say.
  if (cudaFuncGetAttributes(&code, softmax_cluster_kernel<8, false, false, float>) != cudaSuccess ||
      code.ptxVersion < 90) {
    return "l3m_kernels was built without an architecture of 9.0 or above (TORCH_CUDA_ARCH_LIST)";
  }
  return nullptr;
}

cudaError_t softmax_gradient_cluster(const SoftmaxGradient& a, cudaStream_t stream) {
  static_assert(kMostColumns == 262144);
  if (cluster_obstacle(a) != nullptr) return cudaErrorNotSupported;
  const int64_t held = int64_t{kMostBlocks} * kMostThreads * kWidth;  // by a vector of every thread
  if (a.vocabulary <= 8 * held) return launch<8>(a, stream);
  if (a.vocabulary <= 10 * held) return launch<10>(a, stream);
  return launch<kMostVectors>(a, stream);
}

}  // namespace l3m::cuda
