// Launch of the kernel that multiplies a gradient by a number on the device: raw pointers and a stream, no torch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/softmax_gradient.h"

namespace l3m::cuda {

// values[i] *= *factor, rounded once; where the factor is 1 nothing is read. Queues one kernel on the stream of at most
// `blocks` blocks; a count of 0 queues nothing.
cudaError_t scale(void* values, Dtype dtype, int64_t count, const float* factor, int blocks, cudaStream_t stream);

}  // namespace l3m::cuda
