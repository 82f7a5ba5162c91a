// norm(map) and its gradient, one map per warp: as reference.normalize_map, in fp32.

#pragma once

#include "device.h"

namespace softmask::cuda {

constexpr float kNormalizeEps = 1e-7f;  // reference.NORMALIZE_EPS

// A map c becomes (c - low) / divisor.
struct Extent {
  float low, divisor;

  __device__ __forceinline__ float operator()(float value) const { return (value - low) / divisor; }
};

// The extent of a map of `size` patches, in every lane of the warp. map(i) returns element i.
template <typename Map>
__device__ __forceinline__ Extent extent_of(const Map& map, int64_t size, Normalize mode) {
  if (mode == Normalize::kNone) return {0.0f, 1.0f};
  if (mode == Normalize::kSum) {
    float sum = 0.0f;
    for (int64_t i = lane_of(); i < size; i += kWarp) sum += map(i);
    return {0.0f, warp_sum(sum) + kNormalizeEps};
  }
  float high = -INFINITY, negative_low = -INFINITY;
  for (int64_t i = lane_of(); i < size; i += kWarp) {
    const float value = map(i);
    high = max_or_nan(value, high);
    negative_low = max_or_nan(-value, negative_low);
  }
  const float low = mode == Normalize::kMinmax ? -warp_max(negative_low) : 0.0f;
  return {low, warp_max(high) - low + kNormalizeEps};
}

// Turns the gradient of a normalized map into that of the map: calls write(i, gradient) in the lane
// that has element i. Elements that tie for the lowest or the highest share the gradient evenly.
template <typename Map, typename Gradient, typename Write>
__device__ __forceinline__ void normalize_backward(const Map& map, const Gradient& gradient,
                                                   int64_t size, Normalize mode,
                                                   const Write& write) {
  if (mode == Normalize::kNone) {  // the map need not exist
    for (int64_t i = lane_of(); i < size; i += kWarp) write(i, gradient(i));
    return;
  }
  const Extent extent = extent_of(map, size, mode);
  float high = -INFINITY, sum = 0.0f, weighted = 0.0f;  // of the gradient, and times norm(map)
  for (int64_t i = lane_of(); i < size; i += kWarp) {
    const float value = map(i);
    high = max_or_nan(value, high);
    sum += gradient(i);
    weighted += gradient(i) * extent(value);
  }
  high = warp_max(high), sum = warp_sum(sum), weighted = warp_sum(weighted);
  float highest = 0.0f, lowest = 0.0f;  // how many elements tie
  for (int64_t i = lane_of(); i < size; i += kWarp) {
    highest += map(i) == high ? 1.0f : 0.0f;
    lowest += map(i) == extent.low ? 1.0f : 0.0f;
  }
  highest = warp_sum(highest), lowest = warp_sum(lowest);
  for (int64_t i = lane_of(); i < size; i += kWarp) {
    const float value = map(i);
    float total = gradient(i);
    if (mode == Normalize::kSum) total -= weighted;
    if (mode != Normalize::kSum && value == high) total -= weighted / highest;
    if (mode == Normalize::kMinmax && value == extent.low) total += (weighted - sum) / lowest;
    write(i, total / extent.divisor);
  }
}

}  // namespace softmask::cuda
