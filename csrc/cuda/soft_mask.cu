// soft_mask: features scaled by one minus a map. Every feature is read once, every result written
// once.
//
// A block holds a tile of tokens of one image. Its warps read whole maps for their normalization, a
// few hundred numbers, and leave the weights of the tile's tokens in shared memory. Forward,
// threads then scale packs of 16 bytes by the weights of all maps. Backward, a warp per token sums
// over maps in registers, and a second launch, one warp per map, goes back through the
// normalization. Sums have a fixed order.

#include "elements.h"
#include "normalize.h"
#include "soft_mask.h"

namespace softmask::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocks = 2;  // on a multiprocessor: to fit more, the assembler would spill registers
constexpr int kForwardTokens = 16, kBackwardTokens = kWarps;  // of a block
constexpr int kWords = 32;                                    // maps whose weights a block holds
constexpr int kLaneElements = 24;  // of a row, that a lane holds in the backward pass
constexpr int kChunk = kWarp * kLaneElements;
constexpr int64_t kMaxWidth = 1 << 26;  // so that packs of a tile are counted in 32 bits

// One map, as fp32.
struct MapRow {
  const void* data;
  int64_t first;
  Type type;

  __device__ __forceinline__ float operator()(int64_t patch) const {
    const int64_t place = first + patch;
    if (type == Type::kFloat) return static_cast<const float*>(data)[place];
    if (type == Type::kHalf) return to_float(static_cast<const Half*>(data)[place]);
    return to_float(static_cast<const BFloat16*>(data)[place]);
  }
};

__device__ __forceinline__ MapRow map_of(const SoftMask& problem, int64_t image, int64_t word) {
  return {problem.maps, image * problem.maps_image + word * problem.maps_word, problem.map_type};
}

// weights [words, Tokens] = 1 - strength * norm(map) at tokens from `first_token` on, 1 at prefix
// tokens, for maps from `first_word` on.
template <int Tokens>
__device__ __forceinline__ void load_weights(const SoftMask& problem, int64_t image,
                                             int64_t first_token, int64_t first_word, int words,
                                             float* weights) {
  static_assert(Tokens <= kWarp);
  for (int word = warp_of(); word < words; word += kWarps) {
    const MapRow map = map_of(problem, image, first_word + word);
    const Extent extent = extent_of(map, problem.tokens - problem.prefix, problem.normalize);
    const int64_t token = first_token + lane_of();
    if (lane_of() >= Tokens) continue;
    float weight = 1.0f;
    if (token >= problem.prefix && token < problem.tokens) {
      weight = 1.0f - problem.strength * extent(map(token - problem.prefix));
    }
    weights[word * Tokens + lane_of()] = weight;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) forward_kernel(const SoftMask problem) {
  float* weights = shared_memory();  // [kWords, kForwardTokens]
  const int64_t tiles = cdiv(problem.tokens, kForwardTokens);
  const int64_t image = blockIdx.x / tiles, first = blockIdx.x % tiles * kForwardTokens;
  const int64_t left = problem.tokens - first;
  const int count = left < kForwardTokens ? static_cast<int>(left) : kForwardTokens;
  const int packs = static_cast<int>(problem.width / N);
  const T* features = static_cast<const T*>(problem.features) + image * problem.features_image;
  T* out = static_cast<T*>(problem.out);
  for (int64_t word = 0; word < problem.words; word += kWords) {
    const int64_t more = problem.words - word;
    const int words = more < kWords ? static_cast<int>(more) : kWords;
    load_weights<kForwardTokens>(problem, image, first, word, words, weights);
    __syncthreads();  // weights of the tile are written
    for (int item = threadIdx.x; item < count * packs; item += kThreads) {
      const int token = item / packs, column = item % packs * N;
      const Pack<T, N> values =
          load<N>(features + (first + token) * problem.features_token + column);
      for (int w = 0; w < words; ++w) {
        const float weight = weights[w * kForwardTokens + token];
        Pack<T, N> scaled;
#pragma unroll
        for (int i = 0; i < N; ++i) scaled.element[i] = from_float<T>(values[i] * weight);
        const int64_t row = (image * problem.words + word + w) * problem.tokens + first + token;
        store(out + row * problem.width + column, scaled);
      }
    }
    __syncthreads();  // weights of the tile are read
  }
}

// A lane's part of a row: packs lane, lane + 32, ... of a chunk.
template <typename T, int N>
struct LaneRow {
  static constexpr int kPacks = kLaneElements / N;
  Pack<T, N> packs[kPacks];

  __device__ __forceinline__ void read(const T* row, int64_t left) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = (k * kWarp + lane_of()) * N;
      packs[k] = column < left ? load<N>(row + column) : Pack<T, N>{};
    }
  }
};

// For one token, adds d_out * weight of some maps to sums, and writes (or adds) the part of d_norms
// that this chunk of the width gives.
template <typename T, int N>
__device__ __forceinline__ void add_words(const SoftMask& problem, int64_t image, int64_t token,
                                          int64_t first_word, int words, int64_t chunk,
                                          const float* weights, const LaneRow<T, N>& features,
                                          float (&sums)[kLaneElements]) {
  const T* d_out = static_cast<const T*>(problem.d_out) + image * problem.d_out_image +
                   token * problem.d_out_token + chunk;
  for (int w = 0; w < words; ++w) {
    LaneRow<T, N> row;
    row.read(d_out + (first_word + w) * problem.d_out_word, problem.width - chunk);
    const float weight =
        problem.d_features == nullptr ? 0.0f : weights[w * kBackwardTokens + warp_of()];
    float product = 0.0f;
#pragma unroll
    for (int k = 0; k < row.kPacks; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[k * N + i] += row.packs[k][i] * weight;
        product += row.packs[k][i] * features.packs[k][i];
      }
    }
    if (problem.d_maps == nullptr || token < problem.prefix) continue;
    product = -problem.strength * warp_sum(product);
    const int64_t map = image * problem.words + first_word + w;
    float* place =
        problem.d_norms + map * (problem.tokens - problem.prefix) + token - problem.prefix;
    if (lane_of() == 0) *place = chunk == 0 ? product : *place + product;
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks) backward_kernel(const SoftMask problem) {
  float* weights = shared_memory();  // [kWords, kBackwardTokens]
  const int64_t tiles = cdiv(problem.tokens, kBackwardTokens);
  const int64_t image = blockIdx.x / tiles, first = blockIdx.x % tiles * kBackwardTokens;
  const int64_t token = first + warp_of();
  const bool live = token < problem.tokens;
  for (int64_t chunk = 0; chunk == 0 || chunk < problem.width; chunk += kChunk) {
    const int64_t left = problem.width - chunk;
    float sums[kLaneElements] = {};
    LaneRow<T, N> features{};
    if (live && problem.d_maps != nullptr) {
      features.read(static_cast<const T*>(problem.features) + image * problem.features_image +
                        token * problem.features_token + chunk,
                    left);
    }
    for (int64_t word = 0; word < problem.words; word += kWords) {
      const int64_t more = problem.words - word;
      const int words = more < kWords ? static_cast<int>(more) : kWords;
      if (problem.d_features != nullptr) {
        load_weights<kBackwardTokens>(problem, image, first, word, words, weights);
      }
      __syncthreads();  // weights are written
      if (live) add_words(problem, image, token, word, words, chunk, weights, features, sums);
      __syncthreads();  // weights are read
    }
    if (!live || problem.d_features == nullptr) continue;
    T* row = static_cast<T*>(problem.d_features) +
             (image * problem.tokens + token) * problem.width + chunk;
#pragma unroll
    for (int k = 0; k < LaneRow<T, N>::kPacks; ++k) {
      const int column = (k * kWarp + lane_of()) * N;
      Pack<T, N> pack;
#pragma unroll
      for (int i = 0; i < N; ++i) pack.element[i] = from_float<T>(sums[k * N + i]);
      if (column < left) store(row + column, pack);
    }
  }
}

// Turns the gradients of normalized maps into those of the maps, one warp per map.
template <typename M>
__global__ void __launch_bounds__(kThreads, kBlocks) maps_backward_kernel(const SoftMask problem) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of();
  if (index >= problem.images * problem.words) return;
  const int64_t patches = problem.tokens - problem.prefix;
  const float* d_norm = problem.d_norms + index * patches;
  M* d_map = static_cast<M*>(problem.d_maps) + index * patches;
  normalize_backward(
      map_of(problem, index / problem.words, index % problem.words),
      [=](int64_t patch) { return d_norm[patch]; }, patches, problem.normalize,
      [=](int64_t patch, float value) { d_map[patch] = from_float<M>(value); });
}

void check_width(const SoftMask& problem) {
  if (problem.width > kMaxWidth) {
    throw std::length_error(
        "soft_mask: expected features of at most 67108864 elements a token, got " +
        std::to_string(problem.width) + "; use softmask.backend('reference')");
  }
}

}  // namespace

void launch_soft_mask(const SoftMask& problem, Stream stream) {
  check_width(problem);
  const bool wide = is_wide(problem.features, {problem.features_image, problem.features_token},
                            problem.width, size_of(problem.type));
  with_elements(problem.type, wide, [&](auto element, auto pack) {
    launch(forward_kernel<decltype(element), pack>,
           problem.images * cdiv(problem.tokens, kForwardTokens), 1, kThreads,
           kWords * kForwardTokens * sizeof(float), stream, problem);
  });
}

void launch_soft_mask_backward(const SoftMask& problem, Stream stream) {
  check_width(problem);
  const bool wide =
      is_wide(problem.d_out, {problem.d_out_image, problem.d_out_word, problem.d_out_token},
              problem.width, size_of(problem.type)) &&
      is_wide(problem.features, {problem.features_image, problem.features_token}, problem.width,
              size_of(problem.type));
  with_elements(problem.type, wide, [&](auto element, auto pack) {
    launch(backward_kernel<decltype(element), pack>,
           problem.images * cdiv(problem.tokens, kBackwardTokens), 1, kThreads,
           kWords * kBackwardTokens * sizeof(float), stream, problem);
  });
  if (problem.d_maps == nullptr) return;
  with_elements(problem.map_type, false, [&](auto element, auto) {
    launch(maps_backward_kernel<decltype(element)>, cdiv(problem.images * problem.words, kWarps), 1,
           kThreads, 0, stream, problem);
  });
}

}  // namespace softmask::cuda
