// A gradient times a number on the device, in place. The number is 1 wherever the loss itself is differentiated, which the
// host cannot see without waiting: all blocks see it at once, and leave.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

#include "cuda/scale.h"

namespace l3m::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kBytes = 16;  // of a load

__device__ float wide(float x) { return x; }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float wide(__half x) { return __half2float(x); }
__device__ void round_to(float& to, float x) { to = x; }
__device__ void round_to(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ void round_to(__half& to, float x) { to = __float2half_rn(x); }

// `whole` of the values are taken 16 bytes at a time, the rest one by one.
template <typename T>
__global__ void __launch_bounds__(kThreads) scale_kernel(T* values, const float* factor, int64_t whole, int64_t count) {
  const float by = *factor;
  if (by == 1.0f) return;
  constexpr int kEach = kBytes / static_cast<int>(sizeof(T));
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = thread * kEach; i < whole; i += step * kEach) {
    float4 loaded = *reinterpret_cast<const float4*>(values + i);
    T part[kEach];
    memcpy(part, &loaded, kBytes);
    for (int j = 0; j < kEach; ++j) round_to(part[j], wide(part[j]) * by);
    memcpy(&loaded, part, kBytes);
    *reinterpret_cast<float4*>(values + i) = loaded;
  }
  for (int64_t i = whole + thread; i < count; i += step) round_to(values[i], wide(values[i]) * by);
}

template <typename T>
cudaError_t launch(void* values, int64_t count, const float* factor, int64_t blocks, cudaStream_t stream) {
  constexpr int64_t kEach = kBytes / static_cast<int64_t>(sizeof(T));
  const bool aligned = reinterpret_cast<uintptr_t>(values) % kBytes == 0;
  const int64_t whole = aligned ? count / kEach * kEach : 0;
  const int64_t wanted = (count + kThreads * kEach - 1) / (kThreads * kEach);
  const unsigned grid = static_cast<unsigned>(wanted < blocks ? wanted : blocks);
  scale_kernel<T><<<grid, kThreads, 0, stream>>>(static_cast<T*>(values), factor, whole, count);
  return cudaPeekAtLastError();
}

}  // namespace

cudaError_t scale(void* values, Dtype dtype, int64_t count, const float* factor, int blocks, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  if (count < 0 || blocks < 1) return cudaErrorInvalidValue;
  switch (dtype) {
    case Dtype::fp32:
      return launch<float>(values, count, factor, blocks, stream);
    case Dtype::bf16:
      return launch<__nv_bfloat16>(values, count, factor, blocks, stream);
    case Dtype::fp16:
      return launch<__half>(values, count, factor, blocks, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace l3m::cuda
