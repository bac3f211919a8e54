// What both kernels of a row share on the device: dtypes, vectors of four, the sum over a block.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/softmax_gradient.h"
#include "cuda/softmax_row.h"

namespace l3m::cuda {

constexpr int kMostThreads = 512;
constexpr int kWarp = 32;
constexpr int kWidth = 4;  // floats in an access of 128 bits

template <typename T>
__device__ T of_float(float x);
template <>
__device__ inline float of_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 of_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ inline __half of_float<__half>(float x) {
  return __float2half_rn(x);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

// use(bias), with its type; nothing where there is none.
template <typename Use>
__device__ void with_bias(const SoftmaxGradient& a, Use use) {
  if (a.bias_dtype == Dtype::fp32) use(static_cast<const float*>(a.bias));
  if (a.bias_dtype == Dtype::bf16) use(static_cast<const __nv_bfloat16*>(a.bias));
  if (a.bias_dtype == Dtype::fp16) use(static_cast<const __half*>(a.bias));
}

__device__ inline void load_four(const float* from, float (&x)[kWidth]) {
  const float4 four = *reinterpret_cast<const float4*>(from);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

template <typename Gradient>
__device__ void store_four(Gradient* to, const float (&g)[kWidth]) {
  struct alignas(kWidth * sizeof(Gradient)) Four {
    Gradient values[kWidth];
  } four;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) four.values[e] = of_float<Gradient>(g[e]);
  *reinterpret_cast<Four*>(to) = four;
}

// Where the gradient of row r begins.
template <typename Gradient>
__device__ Gradient* gradient_of(const SoftmaxGradient& a, int64_t r) {
  if (a.out != nullptr) return static_cast<Gradient*>(a.out) + r * a.out_stride;
  return reinterpret_cast<Gradient*>(a.logits + r * a.stride);
}

// In an order that depends on nothing; valid in lane 0.
__device__ inline row::Sum sum_of_warp(row::Sum sum) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const float maximum = __shfl_down_sync(0xffffffffu, sum.maximum, step);
    sum = row::combine(sum, {maximum, __shfl_down_sync(0xffffffffu, sum.total, step)});
  }
  return sum;
}

// The sum over the block, in an order that depends on nothing but its size; valid in thread 0.
// `warps` holds one per warp.
__device__ inline row::Sum sum_of_block(row::Sum mine, row::Sum* warps) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  mine = sum_of_warp(mine);
  if (lane == 0) warps[warp] = mine;
  __syncthreads();
  if (warp > 0) return mine;
  return sum_of_warp(lane < static_cast<int>(blockDim.x) / kWarp ? warps[lane] : row::Sum{row::kMinusInfinity, 0.0f});
}

}  // namespace l3m::cuda
