// The gradients of word_attention, from the rows of the attention and the gates that the forward
// pass kept.
//
// A block per map goes back through the normalization and the softmax, and writes the gradients of
// logits and gates. Then a thread per pack of four keys sums over the words' rows (d_key, d_value),
// and a block per few rows sums over keys; the last launches add up the rows that name a token, and
// those of all captions for the bias. Queries and keys take part as grad_output and values do, so
// both are sides of the same kernels. Sums have a fixed order.

#include "normalize.h"
#include "word_attention.h"
#include "word_attention_rows.h"

namespace softmask::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kBlocks = 3;  // on a multiprocessor: to fit more, the assembler would spill registers
constexpr int kKeysOfThread = 4;
constexpr int kColumns = 8,
              kSlots = kThreads / kColumns;  // packs by keys, where rows sum over keys
constexpr int kRows = 4;                     // of a block there
constexpr int kBiasColumns = kWarp;
constexpr int64_t kMaxElements = int64_t{1}
                                 << 31;  // so that packs of a head are counted in 32 bits

// Queries with keys (0) or grad_output with values (1).
struct Side {
  Rows rows, keys;
  const float* coefficients;  // [B, H, R, pitch], the gradient of rows keys^T
  const float* sums;          // [B, H, R], theirs over keys, where the bias needs them, or null
  int64_t width;
  int64_t first_key;  // earlier keys are not read: their coefficients are zero
  float* parts;       // [B, H, R, width]
  void* d_rows;       // [B, H, T, width]
  void* d_keys;       // [B, H, P, width]
};

__device__ __forceinline__ Side side_of(const WordAttention& problem, unsigned side) {
  if (side == 0) {
    return {problem.query,       problem.key,     problem.d_logits, nullptr, problem.width, 0,
            problem.query_parts, problem.d_query, problem.d_key};
  }
  return {problem.grad_output,
          problem.value,
          problem.d_gates,
          problem.bias == nullptr ? nullptr : problem.d_gate_sums,
          problem.value_width,
          problem.prefix,
          problem.grad_output_parts,
          problem.d_grad_output,
          problem.d_value};
}

// For one row of a map: d_logits, d_gates and d_gate_sums, from the row's gradient. A warp
// together.
__device__ __forceinline__ void row_backward(const WordAttention& problem, const float* d_raw,
                                             int64_t row) {
  const float* attention = problem.attention + row * problem.pitch;
  const float* gates = problem.gates == nullptr ? nullptr : problem.gates + row * problem.pitch;
  const auto d_product = [&](int64_t p) {  // with respect to attention * gate
    return p >= problem.prefix && p < problem.keys ? d_raw[p - problem.prefix] : 0.0f;
  };
  float mean = 0.0f, gate_sum = 0.0f;
  for (int64_t p = lane_of(); p < problem.pitch; p += kWarp) {
    const float gate = gates == nullptr ? 1.0f : gates[p];
    mean += attention[p] * gate * d_product(p);
    if (!(gate <= 0.0f)) gate_sum += attention[p] * d_product(p);
  }
  mean = warp_sum(mean), gate_sum = warp_sum(gate_sum);
  for (int64_t p = lane_of(); p < problem.pitch; p += kWarp) {
    const float gate = gates == nullptr ? 1.0f : gates[p];
    const float d_attention = gate * d_product(p);
    problem.d_logits[row * problem.pitch + p] = attention[p] * (d_attention - mean) * problem.scale;
    if (gates == nullptr) continue;
    problem.d_gates[row * problem.pitch + p] = gate <= 0.0f ? 0.0f : attention[p] * d_product(p);
  }
  if (gates != nullptr && lane_of() == 0) problem.d_gate_sums[row] = gate_sum;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    maps_backward_kernel(const WordAttention problem) {
  const int64_t map = blockIdx.x, size = problem.keys - problem.prefix;
  const float* d_map = problem.d_maps + map * size;
  const float* raw = problem.raw + map * size;
  float* d_raw = problem.d_raw + map * size;
  const float count = rows_in_map(problem, map);
  if (warp_of() == 0) {
    const auto raw_of = [=](int64_t i) { return raw[i]; };
    const auto d_map_of = [=](int64_t i) { return d_map[i]; };
    normalize_backward(raw_of, d_map_of, size, problem.normalize,
                       [=](int64_t i, float value) { d_raw[i] = value / count; });
  }
  __syncthreads();  // d_raw is written
  for (int64_t i = warp_of(); i < problem.heads * problem.subtokens; i += kWarps) {
    row_backward(problem, d_raw, place_in_map(problem, map, i));
  }
}

// d_keys: a thread sums over the rows for a pack of each of four neighbouring keys.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    keys_backward_kernel(const WordAttention problem, int blocks_of_pair) {
  const Side side = side_of(problem, blockIdx.y);
  const int64_t pair = blockIdx.x / blocks_of_pair, num_rows = rows_of(problem);
  const int64_t caption = pair / problem.heads, head = pair % problem.heads;
  const int packs = static_cast<int>(side.width / N);
  const int item = blockIdx.x % blocks_of_pair * kThreads + threadIdx.x;
  const int64_t first_key = packs == 0 ? problem.keys : item / packs * kKeysOfThread;
  if (first_key >= problem.keys) return;
  const int column = item % packs * N;
  const T* rows = of_pair<T>(side.rows, caption, head) + column;
  float sums[kKeysOfThread][N] = {};
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t token = problem.index[caption * num_rows + r];
    if (token < 0) continue;
    const auto factors = load<kKeysOfThread>(global(side.coefficients) +
                                             (pair * num_rows + r) * problem.pitch + first_key);
    const Pack<T, N> row =
        token < problem.tokens ? load<N>(rows + token * side.rows.row) : Pack<T, N>{};
#pragma unroll
    for (int k = 0; k < kKeysOfThread; ++k) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[k][i] += factors[k] * row[i];
    }
  }
#pragma unroll
  for (int k = 0; k < kKeysOfThread; ++k) {
    if (first_key + k >= problem.keys) continue;
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.element[i] = from_float<T>(sums[k][i]);
    const int64_t place = (pair * problem.keys + first_key + k) * side.width + column;
    store(global(static_cast<T*>(side.d_keys)) + place, pack);
  }
}

// parts: the gradients of a few rows of one caption and head, summed over keys. A slot of threads
// sums every kSlots-th key; then the slots are added up through shared memory.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rows_backward_kernel(const WordAttention problem) {
  float* by_slot = shared_memory();  // [kSlots, kColumns * N]
  constexpr int kLine = kColumns * N;
  const Side side = side_of(problem, blockIdx.y);
  const int64_t num_rows = rows_of(problem), groups = cdiv(num_rows, kRows);
  const int64_t pair = blockIdx.x / groups, first = blockIdx.x % groups * kRows;
  const int64_t caption = pair / problem.heads, head = pair % problem.heads;
  const int slot = threadIdx.x / kColumns, pack = threadIdx.x % kColumns;
  const T* keys = of_pair<T>(side.keys, caption, head);
  const float* factors = global(side.coefficients) + (pair * num_rows + first) * problem.pitch;
  for (int64_t start = 0; start < side.width; start += kLine) {
    const int64_t column = start + pack * N;
    float sums[kRows][N] = {};
    for (int64_t key = side.first_key + slot; key < problem.keys; key += kSlots) {
      if (column >= side.width || !is_kept(problem, caption, key)) continue;
      const Pack<T, N> values = load<N>(keys + key * side.keys.row + column);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float factor = first + r < num_rows ? factors[r * problem.pitch + key] : 0.0f;
#pragma unroll
        for (int i = 0; i < N; ++i) sums[r][i] += factor * values[i];
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < N; ++i) by_slot[slot * kLine + pack * N + i] = sums[r][i];
      __syncthreads();  // the slots' sums are written
      const int64_t own = start + threadIdx.x, row = pair * num_rows + first + r;
      if (threadIdx.x < kLine && own < side.width && first + r < num_rows) {
        float total = 0.0f;
        for (int s = 0; s < kSlots; ++s) total += by_slot[s * kLine + threadIdx.x];
        if (side.sums != nullptr)
          total += global(side.sums)[row] * problem.bias[head * side.width + own];
        global(side.parts)[row * side.width + own] = total;
      }
      __syncthreads();  // the slots' sums are read
    }
  }
}

// d_rows: every token's sum of the parts of the rows that name it, mostly none.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    tokens_backward_kernel(const WordAttention problem, int blocks_of_pair) {
  const Side side = side_of(problem, blockIdx.y);
  const int64_t pair = blockIdx.x / blocks_of_pair, num_rows = rows_of(problem);
  const int64_t* index = problem.index + pair / problem.heads * num_rows;
  const int item = blockIdx.x % blocks_of_pair * kThreads + threadIdx.x;
  if (item >= problem.tokens * side.width) return;
  const int width = static_cast<int>(side.width), token = item / width, column = item % width;
  float total = 0.0f;
  for (int64_t r = 0; r < num_rows; ++r) {
    if (index[r] == token) total += global(side.parts)[(pair * num_rows + r) * width + column];
  }
  global(static_cast<T*>(side.d_rows))[pair * problem.tokens * width + item] = from_float<T>(total);
}

// d_bias of one head: a block has 32 columns, and its warps share the rows of all captions.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    bias_backward_kernel(const WordAttention problem) {
  float* by_warp = shared_memory();  // [kWarps, kBiasColumns]
  const int64_t num_rows = rows_of(problem), groups = cdiv(problem.value_width, kBiasColumns);
  const int64_t head = blockIdx.x / groups;
  const int64_t column = blockIdx.x % groups * kBiasColumns + lane_of();
  float sum = 0.0f;
  for (int64_t i = warp_of(); i < problem.captions * num_rows; i += kWarps) {
    const int64_t caption = i / num_rows, token = problem.index[i];
    if (column >= problem.value_width || token < 0) continue;
    const T* rows = of_pair<T>(problem.grad_output, caption, head);
    const float value =
        token < problem.tokens ? to_float(rows[token * problem.grad_output.row + column]) : 0.0f;
    const int64_t row = (caption * problem.heads + head) * num_rows + i % num_rows;
    sum += problem.d_gate_sums[row] * value;
  }
  by_warp[threadIdx.x] = sum;
  __syncthreads();  // the warps' sums are written
  if (warp_of() != 0 || column >= problem.value_width) return;
  float total = 0.0f;
  for (int w = 0; w < kWarps; ++w) total += by_warp[w * kBiasColumns + lane_of()];
  problem.d_bias[head * problem.value_width + column] = total;
}

void check_sizes(const WordAttention& problem, int64_t width) {
  const int64_t longest = problem.keys > problem.tokens ? problem.keys : problem.tokens;
  if ((longest + kThreads) * width < kMaxElements) return;
  throw std::length_error(
      "word_attention: expected a head of fewer than 2147483648 elements, got " +
      std::to_string(longest) + " tokens of " + std::to_string(width) +
      "; use softmask.backend('reference')");
}

}  // namespace

void launch_word_attention_backward(const WordAttention& problem, Stream stream) {
  const bool has_values = problem.gates != nullptr;
  const unsigned sides = has_values ? 2 : 1;
  const int64_t width = problem.width > problem.value_width ? problem.width : problem.value_width;
  check_sizes(problem, width);
  const int64_t pairs = problem.captions * problem.heads;
  const int64_t rows = problem.words * problem.subtokens;
  launch(maps_backward_kernel, problem.captions * problem.words, 1, kThreads, 0, stream, problem);
  with_elements(problem.type, is_wide(problem), [&](auto element, auto pack) {
    using T = decltype(element);
    const int64_t of_keys = cdiv(cdiv(problem.keys, kKeysOfThread) * (width / pack), kThreads);
    const int64_t of_tokens = cdiv(problem.tokens * width, kThreads);
    launch(keys_backward_kernel<T, pack>, pairs * of_keys, sides, kThreads, 0, stream, problem,
           static_cast<int>(of_keys));
    launch(rows_backward_kernel<T, pack>, pairs * cdiv(rows, kRows), sides, kThreads,
           kSlots * kColumns * pack * sizeof(float), stream, problem);
    launch(tokens_backward_kernel<T>, pairs * of_tokens, sides, kThreads, 0, stream, problem,
           static_cast<int>(of_tokens));
    if (problem.d_bias == nullptr) return;
    launch(bias_backward_kernel<T>, problem.heads * cdiv(problem.value_width, kBiasColumns), 1,
           kThreads, kWarps * kBiasColumns * sizeof(float), stream, problem);
  });
}

}  // namespace softmask::cuda
