// What kernels are written against: CUDA's own names or, with SOFTMASK_ON_HOST, an emulation that
// runs the same code on the host.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "types.h"

#ifdef SOFTMASK_ON_HOST
#include "host/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace softmask::cuda {

constexpr int kWarp = 32;
constexpr int64_t kMaxBlocks = 0x7fffffff;  // in the grid's first dimension

#ifndef SOFTMASK_ON_HOST

__device__ __forceinline__ float shuffle_xor(float value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// The block's shared memory, aligned to 16 bytes.
__device__ __forceinline__ float* shared_memory() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), unsigned blocks, unsigned layers, unsigned threads,
           size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  kernel<<<dim3(blocks, layers), threads, shared_bytes, stream>>>(arguments...);
}

#endif

// Runs kernel on blocks x layers blocks. Errors of a launch are left to cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned layers, unsigned threads,
            size_t shared_bytes, Stream stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  if (blocks < 0 || blocks > kMaxBlocks) {
    throw std::length_error("expected at most 2147483647 blocks in a launch, the inputs need " +
                            std::to_string(blocks) + "; split the batch");
  }
  start(kernel, static_cast<unsigned>(blocks), layers, threads, shared_bytes, stream, arguments...);
}

__host__ __device__ constexpr int64_t cdiv(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

__device__ __forceinline__ int lane_of() { return threadIdx.x % kWarp; }
__device__ __forceinline__ int warp_of() { return threadIdx.x / kWarp; }

// The sum over a warp, in every lane, in an order that does not vary.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) value += shuffle_xor(value, lanes);
  return value;
}

__device__ __forceinline__ float max_or_nan(float one, float other) {
  return one > other || one != one ? one : other;
}

// The largest value in a warp, in every lane; NaN if there is one.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    value = max_or_nan(value, shuffle_xor(value, lanes));
  }
  return value;
}

}  // namespace softmask::cuda
