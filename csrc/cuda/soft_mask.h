// out = features * (1 - strength * norm(map)) and its gradients: what the kernels take.

#pragma once

#include "types.h"

namespace softmask::cuda {

// Strides count elements; rows (the last dimension) are contiguous. Outputs are contiguous.
struct SoftMask {
  int64_t images;  // B
  int64_t words;   // W, the maps of an image
  int64_t tokens;  // P
  int64_t width;   // D
  int64_t prefix;  // leading tokens that no map covers; P' = P - prefix
  Type type;       // of features, out and their gradients
  Type map_type;   // of maps and d_maps
  Normalize normalize;
  float strength;
  const void* maps;  // [B, W, P']
  int64_t maps_image;
  int64_t maps_word;
  const void* features;  // [B, P, D], null in a backward pass without d_maps
  int64_t features_image;
  int64_t features_token;
  void* out;          // [B, W, P, D], forward only, as all above; below, backward only
  const void* d_out;  // [B, W, P, D]
  int64_t d_out_image;
  int64_t d_out_word;
  int64_t d_out_token;
  void* d_features;  // [B, P, D], null if it is not wanted
  float* d_norms;    // [B, W, P'], scratch for d_maps
  void* d_maps;      // [B, W, P'], null if it is not wanted
};

void launch_soft_mask(const SoftMask& problem, Stream stream);
void launch_soft_mask_backward(const SoftMask& problem, Stream stream);

}  // namespace softmask::cuda
