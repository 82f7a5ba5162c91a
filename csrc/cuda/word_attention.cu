// word_attention: rows of the attention, or of Grad-CAM, at the tokens of words, and no other row.
//
// Two launches. A block of the first holds a tile of one head's keys, a thread per key, and passes
// the tile's columns through shared memory in chunks; each thread multiplies its key, then its
// value, with several rows of the words at once. It writes logits and gates, one number per head,
// row and key. A block of the second makes one map: warps compute the softmax's statistics of rows,
// then threads add up heads and sub-tokens by key. With `keep`, the rows are left in place as the
// attention. Sums have a fixed order.

#include "normalize.h"
#include "word_attention.h"
#include "word_attention_rows.h"

namespace softmask::cuda {
namespace {

constexpr int kKeys = 128;          // of a block of the first launch, one per thread
constexpr int kChunk = 32;          // columns in shared memory
constexpr int kPitch = kChunk + 1;  // so that neighbouring keys are in different banks
constexpr int kBlocks = 4;  // on a multiprocessor: to fit more, the assembler would spill registers
constexpr int kMany = 8;    // rows that a thread multiplies at once, if there are several
constexpr int kThreads = 256, kWarps = kThreads / kWarp;  // of the second launch
constexpr int kStatistics = 64;                           // rows whose statistics a block holds

// A tile of keys or values and the rows that it is multiplied with, of one caption and head.
template <typename T>
struct Product {
  const T* rows;  // by token
  int64_t row;    // stride
  const T* keys;  // by position
  int64_t key;    // stride
  int64_t width;
  const float* bias;  // added to keys, or null
  int64_t first_key;  // earlier ones count as zero

  // sums [R] = rows at the index's tokens times this thread's key. Threads of the block together;
  // `memory` holds [kKeys, kPitch] and [kChunk, R] floats.
  template <int N, int R>
  __device__ __forceinline__ void operator()(const WordAttention& problem, int64_t caption,
                                             int64_t first_row, int64_t first_position,
                                             float* memory, float (&sums)[R]) const {
    float* tile = memory;
    float* left = memory + kKeys * kPitch;
    for (int64_t column = 0; column < width; column += kChunk) {
      load_keys<N>(problem, caption, first_position, column, tile);
      load_rows<R>(problem, caption, first_row, column, left);
      __syncthreads();  // the chunk is written
      float partial[R] = {};
#pragma unroll 8
      for (int c = 0; c < kChunk; ++c) {
        const float one = tile[threadIdx.x * kPitch + c];
        const auto many = load<R>(left + c * R);
#pragma unroll
        for (int r = 0; r < R; ++r) partial[r] += many[r] * one;
      }
#pragma unroll
      for (int r = 0; r < R; ++r) sums[r] += partial[r];
      __syncthreads();  // the chunk is read
    }
  }

  template <int N>
  __device__ __forceinline__ void load_keys(const WordAttention& problem, int64_t caption,
                                            int64_t first_position, int64_t column,
                                            float* tile) const {
    constexpr int kPacks = kChunk / N;
    for (int item = threadIdx.x; item < kKeys * kPacks; item += kKeys) {
      const int slot = item / kPacks, c = item % kPacks * N;
      const int64_t position = first_position + slot;
      const bool live = column + c < width && position >= first_key;
      Pack<T, N> pack{};
      if (live && is_kept(problem, caption, position)) {
        pack = load<N>(keys + position * key + column + c);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float added = live && bias != nullptr ? bias[column + c + i] : 0.0f;
        tile[slot * kPitch + c + i] = pack[i] + added;
      }
    }
  }

  template <int R>
  __device__ __forceinline__ void load_rows(const WordAttention& problem, int64_t caption,
                                            int64_t first_row, int64_t column, float* left) const {
    const int64_t num_rows = rows_of(problem);
    for (int item = threadIdx.x; item < kChunk * R; item += kKeys) {
      const int64_t r = first_row + item / kChunk, c = column + item % kChunk;
      const int64_t token = r < num_rows ? problem.index[caption * num_rows + r] : -1;
      const bool live = token >= 0 && token < problem.tokens && c < width;
      left[item % kChunk * R + item / kChunk] = live ? to_float(rows[token * row + c]) : 0.0f;
    }
  }
};

// Logits, -inf at keys that do not take part, and gates.
template <typename T, int N, int R>
__global__ void __launch_bounds__(kKeys, kBlocks) rows_kernel(const WordAttention problem) {
  float* memory = shared_memory();
  const int64_t tiles = cdiv(problem.pitch, kKeys), num_rows = rows_of(problem);
  const int64_t pair = blockIdx.x / tiles, first = blockIdx.x % tiles * kKeys;
  const int64_t caption = pair / problem.heads, head = pair % problem.heads;
  const int64_t position = first + threadIdx.x;
  const bool kept = is_kept(problem, caption, position);
  const Product<T> logits_of{of_pair<T>(problem.query, caption, head),
                             problem.query.row,
                             of_pair<T>(problem.key, caption, head),
                             problem.key.row,
                             problem.width,
                             nullptr,
                             0};
  const Product<T> gates_of{
      of_pair<T>(problem.grad_output, caption, head),
      problem.grad_output.row,
      of_pair<T>(problem.value, caption, head),
      problem.value.row,
      problem.value_width,
      problem.bias == nullptr ? nullptr : problem.bias + head * problem.value_width,
      problem.prefix};
  for (int64_t row = 0; row < num_rows; row += R) {
    float logits[R] = {}, gates[R] = {};
    logits_of.template operator()<N>(problem, caption, row, first, memory, logits);
    if (problem.gates != nullptr) {
      gates_of.template operator()<N>(problem, caption, row, first, memory, gates);
    }
    if (position >= problem.pitch) continue;
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (row + r >= num_rows) continue;
      const int64_t token = problem.index[caption * num_rows + row + r];
      const int64_t place = (pair * num_rows + row + r) * problem.pitch + position;
      const bool live = kept && token >= 0;
      const float factor = token < problem.tokens ? problem.scale : NAN;  // beyond the text
      problem.attention[place] = live ? logits[r] * factor : -INFINITY;
      if (problem.gates == nullptr) continue;
      const bool open =
          live && position >= problem.prefix && !(gates[r] < 0.0f);  // lets NaN through
      problem.gates[place] = open ? gates[r] : 0.0f;
    }
  }
}

// For rows i = 0 to `rows` - 1 of those that a map averages, from `first` on: the largest logit and
// the reciprocal of the sum of exponentials, both 0 if no key takes part; statistics [rows, 2].
__device__ __forceinline__ void softmax_statistics(const WordAttention& problem, int64_t map,
                                                   int64_t first, int rows, float* statistics) {
  for (int i = warp_of(); i < rows; i += kWarps) {
    const float* logits = problem.attention + place_in_map(problem, map, first + i) * problem.pitch;
    float top = -INFINITY, total = 0.0f;
    for (int64_t p = lane_of(); p < problem.keys; p += kWarp) top = max_or_nan(logits[p], top);
    top = warp_max(top);
    if (top == -INFINITY) top = 0.0f;
    for (int64_t p = lane_of(); p < problem.keys; p += kWarp) total += expf(logits[p] - top);
    total = warp_sum(total);
    if (lane_of() != 0) continue;
    statistics[2 * i] = top;
    statistics[2 * i + 1] = total == 0.0f ? 0.0f : 1.0f / total;
  }
}

// The sum of `rows` rows at a key, times their gates.
__device__ __forceinline__ float sum_of_rows(const WordAttention& problem, int64_t map,
                                             int64_t first, int rows, int64_t position,
                                             const float* statistics) {
  int64_t place = place_in_map(problem, map, first) * problem.pitch + position;
  int64_t subtoken = first % problem.subtokens;
  float sum = 0.0f;
  for (int i = 0; i < rows; ++i) {
    const float attention =
        expf(problem.attention[place] - statistics[2 * i]) * statistics[2 * i + 1];
    if (problem.keep) problem.attention[place] = attention;
    sum += problem.gates == nullptr ? attention : attention * problem.gates[place];
    place += problem.pitch;
    if (++subtoken < problem.subtokens) continue;
    subtoken = 0;  // of the next head
    place += (rows_of(problem) - problem.subtokens) * problem.pitch;
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads, kBlocks) combine_kernel(const WordAttention problem) {
  float* statistics = shared_memory();
  const int64_t map = blockIdx.x, size = problem.keys - problem.prefix;
  const int64_t num_rows = problem.heads * problem.subtokens;
  const float count = rows_in_map(problem, map);
  float* out = problem.maps + map * size;
  for (int64_t first = 0; first < num_rows; first += kStatistics) {
    const int64_t left = num_rows - first;
    const int rows = left < kStatistics ? static_cast<int>(left) : kStatistics;
    softmax_statistics(problem, map, first, rows, statistics);
    __syncthreads();  // statistics are written
    for (int64_t p = threadIdx.x; p < problem.pitch; p += kThreads) {
      const float sum = sum_of_rows(problem, map, first, rows, p, statistics);
      if (p < problem.prefix || p >= problem.keys) continue;
      float* place = out + p - problem.prefix;
      const float total = first == 0 ? sum : *place + sum;
      *place = left <= kStatistics ? total / count : total;
    }
    __syncthreads();  // statistics are read, and the map is written
  }
  if (problem.normalize == Normalize::kNone) return;
  const Extent extent = extent_of([=](int64_t i) { return out[i]; }, size, problem.normalize);
  __syncthreads();  // the map is read
  for (int64_t i = threadIdx.x; i < size; i += kThreads) {
    const float value = out[i];
    if (problem.raw != nullptr) problem.raw[map * size + i] = value;
    out[i] = extent(value);
  }
}

}  // namespace

bool is_wide(const WordAttention& problem) {
  const auto rows_are = [&](const Rows& rows, int64_t width) {
    return is_wide(rows.data, {rows.batch, rows.head, rows.row}, width, size_of(problem.type));
  };
  return rows_are(problem.query, problem.width) && rows_are(problem.key, problem.width) &&
         rows_are(problem.value, problem.value_width) &&
         rows_are(problem.grad_output, problem.value_width);
}

void launch_word_attention(const WordAttention& problem, Stream stream) {
  const int64_t rows = problem.words * problem.subtokens;
  const int64_t blocks = problem.captions * problem.heads * cdiv(problem.pitch, kKeys);
  const auto shared_bytes = [](int at_once) {
    return (kKeys * kPitch + kChunk * at_once) * sizeof(float);
  };
  with_elements(problem.type, is_wide(problem), [&](auto element, auto pack) {
    using T = decltype(element);
    if (rows == 1) {
      launch(rows_kernel<T, pack, 1>, blocks, 1, kKeys, shared_bytes(1), stream, problem);
    } else {
      launch(rows_kernel<T, pack, kMany>, blocks, 1, kKeys, shared_bytes(kMany), stream, problem);
    }
  });
  launch(combine_kernel, problem.captions * problem.words, 1, kThreads,
         2 * kStatistics * sizeof(float), stream, problem);
}

}  // namespace softmask::cuda
