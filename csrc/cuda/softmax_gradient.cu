// Softmax, log-likelihood of the target and gradient of a row of logits, in place or into `out`, in two passes. One
// block per row.
//
// Pass 1 reads the row from its end to its beginning (running maximum and sum), pass 2 from its beginning to its end:
// what was read last is still in the cache. Pass 2 overwrites the row by its gradient. A 16-bit gradient begins where
// the row does: element i is written over element i / 2, which was read when all threads had loaded their part of the
// tile. Into `out` nothing waits.
#include <algorithm>

#include "cuda/softmax_gradient.h"
#include "cuda/softmax_gradient_block.h"
#include "cuda/softmax_row.h"

namespace l3m::cuda {
namespace {

constexpr int kBlocks = 2;   // per multiprocessor: one computes while the other waits at its barriers; one where rows
                             // are not aligned, whose addresses need more registers
constexpr int kVectors = 2;  // loads of 128 bits in flight per thread; 4 spill registers on two architectures

// Rows that a cluster takes where nobody says. Milliseconds of 1024 rows on an H200 (`bench/gpu_rows.py`), with a 16-bit
// gradient / without, two passes -> cluster: V = 32000 0.091 / 0.056 -> 0.063 / 0.050, 65536 0.184 / 0.094 -> 0.122 /
// 0.094, 128256 0.356 / 0.167 -> 0.238 / 0.187, 152064 0.42 / 0.196 -> 0.27 / 0.204, 256000 0.69 / 0.311 -> 0.51 /
// 0.404: there a thread holds so much that no second block fits beside it, and rows without a gradient take a third
// longer.
constexpr int64_t kLeastOfCluster = 32000, kMostOfCluster = 163840;

using row::Statistics;
using row::Sum;
using row::Value;

// Which columns a thread has in a tile of blockDim * kVectors * kWidth: vectors of neighbours where the rows are
// aligned, else single elements, a warp apart. A warp reads whole lines either way.
template <bool kAligned>
__device__ int column_of(int tile, int vector, int element) {
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int base = (tile * kVectors + vector) * kWidth * threads;
  if (kAligned) return base + thread * kWidth + element;
  return base + thread / kWarp * kWarp * kWidth + element * kWarp + thread % kWarp;
}

// Whether a tile ends inside the row is known per tile, so that only the last one looks at its columns.
template <bool kAligned, bool kFull>
struct Tile {
  int index, vocabulary;

  __device__ bool inside(int v, int e) const { return kFull || column_of<kAligned>(index, v, e) < vocabulary; }

  __device__ bool four_inside(int v) const { return kAligned && (kFull || inside(v, kWidth - 1)); }

  __device__ void load(const float* logits, float (&x)[kVectors][kWidth]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float* first = logits + column_of<kAligned>(index, v, 0);
      if (four_inside(v)) {
        load_four(first, x[v]);
        continue;
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        x[v][e] = inside(v, e) ? logits[column_of<kAligned>(index, v, e)] : 0.0f;
      }
    }
  }

  __device__ void add_bias(const SoftmaxGradient& a, float (&x)[kVectors][kWidth]) const {
    with_bias(a, [&](auto bias) {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (inside(v, e)) x[v][e] += to_float(bias[column_of<kAligned>(index, v, e)]);
        }
      }
    });
  }

  template <typename Gradient>
  __device__ void store(Gradient* out, int v, const float (&g)[kWidth]) const {
    if (four_inside(v)) {
      store_four(out + column_of<kAligned>(index, v, 0), g);
      return;
    }
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (inside(v, e)) out[column_of<kAligned>(index, v, e)] = of_float<Gradient>(g[e]);
    }
  }
};

// A row as the functions below see it.
struct Row {
  const SoftmaxGradient& a;
  row::Transform transform;
  float* logits;
  int target;  // -1: none

  __device__ int vocabulary() const { return static_cast<int>(a.vocabulary); }

  __device__ int tile_size() const { return kVectors * kWidth * static_cast<int>(blockDim.x); }
  __device__ int tiles() const { return (vocabulary() - 1) / tile_size() + 1; }

  // body(Tile)
  template <bool kAligned, typename Body>
  __device__ void with_tile(int index, Body body) const {
    if ((index + 1) * tile_size() <= vocabulary()) {
      body(Tile<kAligned, true>{index, vocabulary()});
    } else {
      body(Tile<kAligned, false>{index, vocabulary()});
    }
  }
};

// The sum over all of the row but the target, from the end to the beginning.
template <bool kAligned>
__device__ Sum others(const Row& one) {
  Sum sum{row::kMinusInfinity, 0.0f};
  for (int index = one.tiles() - 1; index >= 0; --index) {
    one.with_tile<kAligned>(index, [&](auto tile) {
      float x[kVectors][kWidth];
      tile.load(one.logits, x);
      tile.add_bias(one.a, x);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float z[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          const int column = column_of<kAligned>(index, v, e);
          const bool counts = tile.inside(v, e) && column != one.target;
          z[e] = counts ? row::transform(x[v][e], one.transform).z : row::kMinusInfinity;
        }
        sum.add(z);
      }
    });
  }
  return sum;
}

// Writes the row's gradient, but that of the target.
template <bool kAligned, typename Gradient>
__device__ void write(const Row& one, Gradient* out, const Statistics& statistics, float scale) {
  for (int index = 0; index < one.tiles(); ++index) {
    one.with_tile<kAligned>(index, [&](auto tile) {
      float x[kVectors][kWidth];
      tile.load(one.logits, x);
      if (sizeof(Gradient) < sizeof(float) && one.a.out == nullptr) __syncthreads();
      tile.add_bias(one.a, x);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float g[kWidth];
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          g[e] = row::gradient(row::transform(x[v][e], one.transform), statistics, scale);
        }
        tile.store(out, v, g);
      }
    });
  }
}

template <bool kAligned, typename Gradient>
__device__ void fill(const Row& one, Gradient* out, float value) {
  const float g[kWidth] = {value, value, value, value};
  for (int index = 0; index < one.tiles(); ++index) {
    one.with_tile<kAligned>(index, [&](auto tile) {
      for (int v = 0; v < kVectors; ++v) tile.store(out, v, g);
    });
  }
}

// kGradient: whether there is one; Gradient is then its type.
template <bool kAligned, bool kGradient, typename Gradient>
__global__ void __launch_bounds__(kMostThreads, kAligned ? kBlocks : 1) softmax_gradient_kernel(SoftmaxGradient a) {
  __shared__ Sum sums[kMostThreads / kWarp];
  __shared__ Statistics found;
  const row::Transform transform{a.softcap, a.softcap == 0.0f ? 0.0f : 1.0f / a.softcap, a.inverse_temperature};
  for (int64_t r = blockIdx.x; r < a.rows; r += gridDim.x) {
    const int64_t wanted = a.target[r];
    const bool inside = 0 <= wanted && wanted < a.vocabulary;
    const Row one{a, transform, a.logits + r * a.stride, inside ? static_cast<int>(wanted) : -1};
    const float scale = kGradient ? a.upstream[r] * a.inverse_temperature : 0.0f;
    if (!inside && !a.known_lse) {
      if (threadIdx.x == 0) {
        *a.flag = 1;  // every block that writes it writes this
        a.token[r] = a.lse[r] = NAN;
      }
      if (kGradient) fill<kAligned>(one, gradient_of<Gradient>(a, r), scale == 0.0f ? 0.0f : NAN);
      continue;
    }
    // Everyone reads the target before anyone overwrites it: a barrier is between.
    float logit = inside ? one.logits[one.target] : 0.0f;
    if (inside) with_bias(a, [&](auto bias) { logit += to_float(bias[one.target]); });
    const Value own = row::transform(logit, transform);
    if (!a.known_lse) {
      const Sum sum = sum_of_block(others<kAligned>(one), sums);
      if (threadIdx.x == 0) {
        found = row::statistics(sum, own.z);
        a.token[r] = found.token;
        a.lse[r] = found.lse;
      }
    } else if (threadIdx.x == 0) {
      found = row::statistics_of(a.lse[r], own.z);
    }
    __syncthreads();
    if (kGradient) {
      const Statistics statistics = found;
      Gradient* out = gradient_of<Gradient>(a, r);
      write<kAligned>(one, out, statistics, scale);
      __syncthreads();  // the target's gradient comes after all the others
      if (threadIdx.x == 0 && inside) {
        const float g = row::target_gradient(statistics.complement, own.slope, scale);
        out[one.target] = of_float<Gradient>(g);
      }
    }
    // The next row may take the shared memory: everyone has read it before the last barrier.
  }
}

// Threads of a block: enough that a row is a tile or more, in whole warps.
int threads_of(int64_t vocabulary) {
  int threads = 128;
  while (threads < kMostThreads && threads * kVectors * kWidth < vocabulary) threads *= 2;
  return threads;
}

template <bool kAligned, bool kGradient, typename Gradient>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(a.rows, (int64_t{1} << 31) - 1));
  softmax_gradient_kernel<kAligned, kGradient, Gradient><<<blocks, threads_of(a.vocabulary), 0, stream>>>(a);
  return cudaPeekAtLastError();
}

template <bool kAligned>
cudaError_t launch(const SoftmaxGradient& a, cudaStream_t stream) {
  switch (a.gradient) {
    case Dtype::fp32:
      return launch<kAligned, true, float>(a, stream);
    case Dtype::bf16:
      return launch<kAligned, true, __nv_bfloat16>(a, stream);
    case Dtype::fp16:
      return launch<kAligned, true, __half>(a, stream);
    default:
      return launch<kAligned, false, float>(a, stream);
  }
}

}  // namespace

cudaError_t softmax_gradient(const SoftmaxGradient& arguments, cudaStream_t stream, RowKernel kernel) {
  if (arguments.rows == 0) return cudaSuccess;
  // A column is an int, also one past the end of the last tile.
  if (arguments.rows < 0 || arguments.vocabulary < 1 || arguments.vocabulary > (int64_t{1} << 31) - (1 << 16)) {
    return cudaErrorInvalidValue;
  }
  if (kernel == RowKernel::automatic) {
    const bool measured = kLeastOfCluster <= arguments.vocabulary && arguments.vocabulary <= kMostOfCluster;
    // With and without a gradient alike: a row's log-likelihood has the same bits in both.
    kernel = measured && cluster_obstacle(arguments) == nullptr ? RowKernel::cluster : RowKernel::two_pass;
  }
  // With lse known there is one pass here too.
  if (kernel == RowKernel::cluster && !arguments.known_lse) return softmax_gradient_cluster(arguments, stream);
  return aligned(arguments) ? launch<true>(arguments, stream) : launch<false>(arguments, stream);
}

}  // namespace l3m::cuda
