// Selects the patches of an image that are most, or least, relevant to its caption, on the CPU.
//
// One thread handles an image. Tokens are normalized first; a patch's norm divides its maximum over
// the tokens. There is no matrix product, because BLAS rounds a row differently depending on its
// position in the matrix, and equal patches would not tie.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "simd.h"

namespace softmask {
namespace {

constexpr double kNormEps = 1e-12;  // as in F.normalize

// For each patch, the largest cosine similarity with a token that is not ignored. `similarity` is
// scratch for one patch's products with all tokens.
struct Relevance {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const acc_t* patches, int64_t size, int64_t width,
                                  const acc_t* directions, int64_t tokens, const bool* ignore,
                                  acc_t* similarity, acc_t* relevance) {
    for (int64_t p = 0; p < size; ++p, patches += width) {
      simd::dots<Bytes>(similarity, patches, directions, width, tokens, width);
      acc_t highest = simd::kLowest<acc_t>, square, broken = 0;
      for (int64_t t = 0; t < tokens; ++t) {
        const acc_t s = ignore != nullptr && ignore[t] ? simd::kLowest<acc_t> : similarity[t];
        highest = s > highest ? s : highest;
        broken = s != s ? s : broken;  // propagates NaN, as torch does
      }
      simd::dots<Bytes>(&square, patches, patches, 0, 1, width);
      const acc_t norm = std::sqrt(square);
      relevance[p] = (highest + broken) / (norm > acc_t(kNormEps) ? norm : acc_t(kNormEps));
    }
  }
};

// Marks the `count` patches with the highest (or lowest) relevance. NaN ranks above all numbers, as
// in torch; ties go to the lower position.
template <typename acc_t>
void select(const std::vector<acc_t>& relevance, int64_t count, bool high, bool* selected) {
  const auto size = static_cast<int64_t>(relevance.size());
  std::vector<int64_t> order(size);
  std::iota(order.begin(), order.end(), 0);
  const auto above = [](acc_t a, acc_t b) { return std::isnan(a) ? !std::isnan(b) : a > b; };
  const auto before = [&](int64_t i, int64_t j) {
    const acc_t a = relevance[i], b = relevance[j];
    if (above(a, b) || above(b, a)) return high ? above(a, b) : above(b, a);
    return i < j;
  };
  if (count > 0 && count < size)
    std::nth_element(order.begin(), order.begin() + count, order.end(), before);
  std::fill_n(selected, size, false);
  for (int64_t k = 0; k < count; ++k) selected[order[k]] = true;
}

template <typename acc_t>
void kernel(const at::Tensor& patches, const at::Tensor& tokens, const at::Tensor& ignore,
            int64_t count, bool high, const at::Tensor& selected) {
  const int64_t size = patches.size(1), words = tokens.size(1), width = patches.size(2);
  const auto type = c10::CppTypeToScalarType<acc_t>::value;
  const at::Tensor wide = tokens.to(type);
  const at::Tensor directions = (wide / wide.norm(2, {2}, true).clamp_min(kNormEps)).contiguous();
  const acc_t* direction = directions.const_data_ptr<acc_t>();
  bool* marks = selected.mutable_data_ptr<bool>();
  at::parallel_for(0, patches.size(0), 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // thread-local
    std::vector<acc_t> similarity(words), relevance(size);
    for (int64_t b = begin; b < end; ++b) {
      const at::Tensor image = patches.select(0, b).to(type).contiguous();
      const bool* skip = ignore.defined() ? ignore.const_data_ptr<bool>() + b * words : nullptr;
      simd::run<Relevance>(image.const_data_ptr<acc_t>(), size, width,
                           direction + b * words * width, words, skip, similarity.data(),
                           relevance.data());
      select(relevance, count, high, marks + b * size);
    }
  });
}

at::Tensor attentive_mask(const at::Tensor& patches, const at::Tensor& tokens,
                          const std::optional<at::Tensor>& token_padding_mask, int64_t count,
                          bool high) {
  TORCH_CHECK_VALUE(count >= 0 && count <= patches.size(1), "count: expected 0 to ",
                    patches.size(1), ", got ", count);
  const at::Tensor selected =
      at::empty({patches.size(0), patches.size(1)}, patches.options().dtype(at::kBool));
  const at::Tensor ignore =
      token_padding_mask.has_value() ? token_padding_mask->contiguous() : at::Tensor();
  if (patches.scalar_type() == at::kDouble || tokens.scalar_type() == at::kDouble) {
    kernel<double>(patches, tokens, ignore, count, high, selected);
  } else {
    kernel<float>(patches, tokens, ignore, count, high, selected);
  }
  return selected;
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) { m.impl("attentive_mask", &softmask::attentive_mask); }
