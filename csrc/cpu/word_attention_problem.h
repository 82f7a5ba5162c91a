// Inputs, kept rows and gradients of word_attention, as its kernels read and write them.

#pragma once

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "rows.h"
#include "types.h"
#include "vector.h"

namespace softmask::words {

template <typename scalar_t>
struct Problem {
  using acc_t = at::opmath_type<scalar_t>;

  int64_t batch, heads, tokens, patches, width, value_width, words, subtokens, prefix;
  acc_t scale;
  bool gradcam;
  Rows<const scalar_t> query, key, value, grad_output;
  const acc_t* bias;     // [H, V], or null
  const bool* ignore;    // [B, P], or null: marked keys and their values may hold anything
  const int64_t* index;  // [B, W, S]

  SOFTMASK_INLINE const bool* ignored_of(int64_t b) const {
    return ignore == nullptr ? nullptr : ignore + b * patches;
  }

  SOFTMASK_INLINE int64_t subtokens_of(int64_t b, int64_t w) const {
    int64_t count = 0;
    for (int64_t s = 0; s < subtokens; ++s) count += index[(b * words + w) * subtokens + s] >= 0;
    return count;
  }

  SOFTMASK_INLINE int64_t rows() const { return words * subtokens; }

  SOFTMASK_INLINE bool ignores_all(int64_t b) const {
    const bool* ignored = ignored_of(b);
    return ignored != nullptr &&
           std::all_of(ignored, ignored + patches, [](bool one) { return one; });
  }
};

// What the forward pass keeps for the gradient, [1 or 2, B, H, W S, pitch]: the words' rows of the
// attention and, for Grad-CAM, of the gradient with respect to it. Null if nothing is kept.
template <typename T>
struct Kept {
  T *attention = nullptr, *gradient = nullptr;
  int64_t pitch = 0;

  Kept() = default;
  explicit Kept(const at::Tensor& kept) : pitch(kept.size(-1)) {
    if constexpr (std::is_const_v<T>) {
      attention = kept.const_data_ptr<std::remove_const_t<T>>();
    } else {
      attention = kept.mutable_data_ptr<T>();
    }
    if (kept.size(0) == 2) gradient = attention + kept.numel() / 2;
  }

  // Zeros the row at `place` from column `first` on, so that no uninitialized memory is returned.
  SOFTMASK_INLINE void blank_from(int64_t place, int64_t first) const {
    if (attention != nullptr) std::fill_n(attention + place + first, pitch - first, T(0));
    if (gradient != nullptr) std::fill_n(gradient + place + first, pitch - first, T(0));
  }
};

// Where the gradients are written: contiguous, with the inputs' shapes, but bias per caption, [B,
// H, V].
template <typename acc_t>
struct Gradients {
  Rows<acc_t> query, key, value, grad_output;
  acc_t* bias;
};

// The arguments, in the types and layouts that the kernels read.
struct Inputs {
  at::ScalarType type;  // of query, key, value and grad_output
  at::Tensor query, key, word_index, value, grad_output, bias, ignore;
  double scale;
  int64_t prefix;

  Inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& word_index,
         const OptionalTensor& value, const OptionalTensor& grad_output,
         const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale,
         int64_t prefix)
      : type(has_type(value_bias, at::kDouble) ? at::kDouble
                                               : common_type(query, key, value, grad_output)),
        query(dense_rows(query.to(type))),
        key(dense_rows(key.to(type))),
        word_index(word_index.contiguous()),
        scale(scale),
        prefix(prefix) {
    TORCH_CHECK_VALUE(
        query.dim() == 4 && key.dim() == 4 && word_index.dim() == 3,
        "query, key, word_index: expected [B, H, T, E], [B, H, P, E], [B, W, S], got ",
        query.sizes(), ", ", key.sizes(), ", ", word_index.sizes());
    TORCH_CHECK_VALUE(value.has_value() == grad_output.has_value(),
                      "value, grad_output: expected both or neither");
    TORCH_CHECK_VALUE(prefix >= 0 && prefix < key.size(2), "num_prefix_tokens: expected less than ",
                      key.size(2), " keys, got ", prefix);
    check_range();
    if (value.has_value()) {
      this->value = dense_rows(value->to(type));
      this->grad_output = dense_rows(grad_output->to(type));
    }
    if (value_bias.has_value()) bias = value_bias->to(accumulated()).contiguous();
    if (key_padding_mask.has_value()) ignore = key_padding_mask->contiguous();
  }

  at::ScalarType accumulated() const { return type == at::kDouble ? at::kDouble : at::kFloat; }

  void check_range() const {
    const int64_t* index = word_index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < word_index.numel(); ++i) {
      TORCH_CHECK_VALUE(index[i] >= -1 && index[i] < query.size(2), "word_index: expected -1 to ",
                        query.size(2) - 1, ", got ", index[i]);
    }
  }

  template <typename scalar_t>
  Problem<scalar_t> problem() const {
    using acc_t = at::opmath_type<scalar_t>;
    Problem<scalar_t> problem{};
    problem.batch = query.size(0), problem.heads = query.size(1), problem.tokens = query.size(2);
    problem.patches = key.size(2), problem.width = query.size(3);
    problem.words = word_index.size(1), problem.subtokens = word_index.size(2);
    problem.prefix = prefix;
    problem.scale = static_cast<acc_t>(scale);
    problem.gradcam = value.defined();
    problem.query = rows_of<const scalar_t>(query);
    problem.key = rows_of<const scalar_t>(key);
    if (problem.gradcam) {
      problem.value_width = value.size(3);
      problem.value = rows_of<const scalar_t>(value);
      problem.grad_output = rows_of<const scalar_t>(grad_output);
    }
    problem.bias = bias.defined() ? bias.const_data_ptr<acc_t>() : nullptr;
    problem.ignore = ignore.defined() ? ignore.const_data_ptr<bool>() : nullptr;
    problem.index = word_index.const_data_ptr<int64_t>();
    return problem;
  }
};

}  // namespace softmask::words
