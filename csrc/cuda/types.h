// Types that the kernels share with their callers.

#pragma once

#include <cstdint>

#ifndef SOFTMASK_ON_HOST
#include <cuda_runtime_api.h>
#endif

namespace softmask::cuda {

#ifdef SOFTMASK_ON_HOST
struct Stream {};
#else
using Stream = cudaStream_t;
#endif

enum class Type : int { kFloat, kHalf, kBFloat16 };

enum class Normalize : int { kNone, kMinmax, kMax, kSum };

// A tensor [B, H, N, E] with a contiguous last dimension and any other strides, in elements.
struct Rows {
  const void* data;
  int64_t batch;
  int64_t head;
  int64_t row;
};

}  // namespace softmask::cuda
