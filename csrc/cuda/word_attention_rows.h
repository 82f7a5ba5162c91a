// How the kernels of word_attention, forward and backward, find rows, keys and tokens.

#pragma once

#include "elements.h"
#include "word_attention.h"

namespace softmask::cuda {

__device__ __forceinline__ int64_t rows_of(const WordAttention& problem) {
  return problem.words * problem.subtokens;
}

// The rows of one caption and head.
template <typename T>
__device__ __forceinline__ const T* of_pair(const Rows& rows, int64_t caption, int64_t head) {
  return global(static_cast<const T*>(rows.data)) + caption * rows.batch + head * rows.head;
}

// Whether a key takes part. The others are not read, because 0 times NaN is NaN.
__device__ __forceinline__ bool is_kept(const WordAttention& problem, int64_t caption,
                                        int64_t position) {
  if (position >= problem.keys) return false;
  return problem.ignored == nullptr ||
         !problem.ignored[caption * problem.ignored_caption + position];
}

// By how much the rows of a word are divided: the heads times the word's sub-tokens.
__device__ __forceinline__ float rows_in_map(const WordAttention& problem, int64_t map) {
  int64_t count = 0;
  for (int64_t s = 0; s < problem.subtokens; ++s) {
    count += problem.index[map * problem.subtokens + s] >= 0;
  }
  return static_cast<float>((count > 0 ? count : 1) * problem.heads);
}

// Where row i of the rows that a map averages is kept: its elements before that row.
__device__ __forceinline__ int64_t place_in_map(const WordAttention& problem, int64_t map,
                                                int64_t i) {
  const int64_t caption = map / problem.words, word = map % problem.words;
  const int64_t head = i / problem.subtokens, subtoken = i % problem.subtokens;
  return (caption * problem.heads + head) * rows_of(problem) + word * problem.subtokens + subtoken;
}

}  // namespace softmask::cuda
