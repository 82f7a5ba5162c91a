// out = features * (1 - strength * norm(map)) and its gradients, on the CPU.
//
// Maps are read in double precision whatever their type, because they are 1/D of the features. One
// pass over the features computes the output, and one the whole backward pass, in float (double for
// double); sums of products are in double.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "normalize.h"
#include "rows.h"
#include "simd.h"

namespace softmask {
namespace {

struct Sizes {
  int64_t batch, words, tokens, patches, width, prefix;

  Sizes(const at::Tensor& maps, int64_t tokens, int64_t width, int64_t prefix)
      : batch(maps.size(0)),
        words(maps.dim() == 3 ? maps.size(1) : 1),
        tokens(tokens),
        patches(maps.size(-1)),
        width(width),
        prefix(prefix) {
    TORCH_CHECK_VALUE(maps.dim() == 2 || maps.dim() == 3, "maps: expected 2 or 3 dimensions, got ",
                      maps.sizes());
    TORCH_CHECK_VALUE(prefix >= 0 && patches > 0 && prefix + patches == tokens, "maps: expected ",
                      tokens - prefix, " patches, got ", maps.sizes());
  }

  int64_t grain() const {  // the fewest rows of tokens per thread
    return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, width));
  }
  int64_t map_grain() const {
    return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, patches));
  }
};

at::Tensor to_double(const at::Tensor& maps) { return maps.to(at::kDouble).contiguous(); }

// 1 - strength * norm(map), [B, W, P'].
at::Tensor map_weights(const at::Tensor& maps, const Sizes& sizes, double strength,
                       Normalize mode) {
  at::Tensor weights = at::empty_like(maps);
  const double* map = maps.const_data_ptr<double>();
  double* weight = weights.mutable_data_ptr<double>();
  const int64_t size = sizes.patches;
  at::parallel_for(0, sizes.batch * sizes.words, sizes.map_grain(),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       const double* c = map + row * size;
                       const Normalizer norm(c, size, mode);
                       for (int64_t i = 0; i < size; ++i)
                         weight[row * size + i] = 1.0 - strength * norm(c[i]);
                     }
                   });
  return weights;
}

template <typename scalar_t>
void forward_kernel(const at::Tensor& features, const at::Tensor& weights, const Sizes& sizes,
                    at::Tensor& out) {
  using acc_t = at::opmath_type<scalar_t>;
  const scalar_t* feature = features.const_data_ptr<scalar_t>();
  const double* weight = weights.const_data_ptr<double>();
  scalar_t* output = out.mutable_data_ptr<scalar_t>();
  const int64_t image_stride = features.stride(0), token_stride = features.stride(1);
  at::parallel_for(
      0, sizes.batch * sizes.words * sizes.tokens, sizes.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const int64_t map = row / sizes.tokens, token = row % sizes.tokens;
          const scalar_t* from = feature + map / sizes.words * image_stride + token * token_stride;
          scalar_t* to = output + row * sizes.width;
          if (token < sizes.prefix) {
            std::copy(from, from + sizes.width, to);
            continue;
          }
          const acc_t w = static_cast<acc_t>(weight[map * sizes.patches + token - sizes.prefix]);
          simd::run<simd::ScaleRow>(from, w, to, sizes.width);
        }
      });
}

struct AddRow {
  template <int Bytes, typename scalar_t, typename acc_t>
  static SOFTMASK_INLINE void run(const scalar_t* from, acc_t factor, acc_t* to, int64_t size) {
    simd::add_scaled(to, from, factor, size);
  }
};

struct ConvertRow {
  template <int Bytes, typename to_t, typename from_t>
  static SOFTMASK_INLINE void run(const from_t* from, to_t* to, int64_t size) {
    simd::convert(to, from, size);
  }
};

// In double, which costs nothing here: memory is the bottleneck.
struct Dot {
  template <int Bytes, typename scalar_t>
  static SOFTMASK_INLINE void run(const scalar_t* left, const scalar_t* right, int64_t size,
                                  double* product) {
    constexpr int64_t kSums = 32;  // independent sums, which the compiler can vectorize
    double sums[kSums] = {};
    int64_t d = 0;
    for (; d + kSums <= size; d += kSums) {
      for (int64_t i = 0; i < kSums; ++i) sums[i] += double(left[d + i]) * double(right[d + i]);
    }
    double total = 0.0;
    for (; d < size; ++d) total += double(left[d]) * double(right[d]);
    for (double sum : sums) total += sum;
    *product = total;
  }
};

// What the backward pass of a token reads and writes; outputs that are not requested are null.
template <typename scalar_t>
struct Backward {
  const scalar_t *grad, *features;  // [B, W, P, D], [B, P, D]
  at::IntArrayRef grad_strides, features_strides;
  const double* weights;    // [B, W, P'], read only for features_grad
  scalar_t* features_grad;  // [B, P, D]: sum over words of grad * weight
  double* norms_grad;       // [B, W, P']: -strength * <grad, features>
  double strength;
};

template <typename scalar_t, typename acc_t>
void token_backward(const Backward<scalar_t>& pass, const Sizes& sizes, int64_t image,
                    int64_t token, acc_t* sum) {
  const int64_t width = sizes.width, row = image * sizes.tokens + token;
  const scalar_t* x =
      pass.features + image * pass.features_strides[0] + token * pass.features_strides[1];
  for (int64_t word = 0; word < sizes.words; ++word) {
    const scalar_t* g = pass.grad + image * pass.grad_strides[0] + word * pass.grad_strides[1] +
                        token * pass.grad_strides[2];
    const int64_t patch = (image * sizes.words + word) * sizes.patches + token - sizes.prefix;
    const bool masked = token >= sizes.prefix;
    if (pass.features_grad != nullptr) {
      const auto w = static_cast<acc_t>(masked ? pass.weights[patch] : 1.0);
      if (sizes.words == 1) {
        simd::run<simd::ScaleRow>(g, w, pass.features_grad + row * width, width);
      } else {
        if (word == 0) std::fill_n(sum, width, acc_t(0));
        simd::run<AddRow>(g, w, sum, width);
      }
    }
    if (pass.norms_grad != nullptr && masked) {
      double product;
      simd::run<Dot>(g, x, width, &product);
      pass.norms_grad[patch] = -pass.strength * product;
    }
  }
  if (pass.features_grad != nullptr && sizes.words != 1) {
    simd::run<ConvertRow>(static_cast<const acc_t*>(sum), pass.features_grad + row * width, width);
  }
}

template <typename scalar_t>
void backward_kernel(const Backward<scalar_t>& pass, const Sizes& sizes) {
  using acc_t = at::opmath_type<scalar_t>;
  at::parallel_for(0, sizes.batch * sizes.tokens, sizes.grain(), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> sum(sizes.width);
    for (int64_t row = begin; row < end; ++row) {
      token_backward(pass, sizes, row / sizes.tokens, row % sizes.tokens, sum.data());
    }
  });
}

// Turns d norm(map) into d map, in place.
void normalize_backward(const at::Tensor& maps, const Sizes& sizes, Normalize mode,
                        at::Tensor& grad) {
  const double* map = maps.const_data_ptr<double>();
  double* output = grad.mutable_data_ptr<double>();
  const int64_t size = sizes.patches;
  at::parallel_for(0, sizes.batch * sizes.words, sizes.map_grain(),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       const double* c = map + row * size;
                       Normalizer(c, size, mode).backward(c, output + row * size, size);
                     }
                   });
}

at::Tensor soft_mask(const at::Tensor& features, const at::Tensor& maps, double strength,
                     std::string_view normalize, int64_t num_prefix_tokens) {
  TORCH_CHECK_VALUE(features.dim() == 3 && features.size(0) == maps.size(0), "features: expected [",
                    maps.size(0), ", P, D], got ", features.sizes());
  const Sizes sizes(maps, features.size(1), features.size(2), num_prefix_tokens);
  const at::Tensor weights =
      map_weights(to_double(maps), sizes, strength, parse_normalize(normalize));
  at::DimVector shape(maps.sizes().slice(0, maps.dim() - 1));
  shape.append({sizes.tokens, sizes.width});
  at::Tensor out = at::empty(shape, features.options());
  const at::Tensor rows = dense_rows(features);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, features.scalar_type(), "soft_mask",
                                  [&] { forward_kernel<scalar_t>(rows, weights, sizes, out); });
  return out;
}

std::tuple<at::Tensor, at::Tensor> soft_mask_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& features, const at::Tensor& maps,
    double strength, std::string_view normalize, int64_t num_prefix_tokens, bool features_grad) {
  const Normalize mode = parse_normalize(normalize);
  const Sizes sizes(maps, grad.size(-2), grad.size(-1), num_prefix_tokens);
  const at::Tensor maps_double = to_double(maps);
  const at::Tensor rows = dense_rows(maps.dim() == 3 ? grad : grad.unsqueeze(1));
  const bool to_maps = features.has_value();
  const at::Tensor features_rows = to_maps ? dense_rows(*features) : rows;
  at::Tensor features_gradient = at::empty({0}, grad.options()), weights = maps_double;
  at::Tensor maps_gradient = at::empty({0}, maps_double.options());
  if (features_grad) {
    features_gradient = at::empty({sizes.batch, sizes.tokens, sizes.width}, grad.options());
    weights = map_weights(maps_double, sizes, strength, mode);
  }
  if (to_maps) maps_gradient = at::empty_like(maps_double);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "soft_mask_backward", [&] {
        const Backward<scalar_t> pass{
            rows.const_data_ptr<scalar_t>(),
            features_rows.const_data_ptr<scalar_t>(),
            rows.strides(),
            features_rows.strides(),
            weights.const_data_ptr<double>(),
            features_grad ? features_gradient.mutable_data_ptr<scalar_t>() : nullptr,
            to_maps ? maps_gradient.mutable_data_ptr<double>() : nullptr,
            strength};
        backward_kernel<scalar_t>(pass, sizes);
      });
  if (to_maps) normalize_backward(maps_double, sizes, mode, maps_gradient);
  return {features_gradient, maps_gradient.to(maps.scalar_type())};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("soft_mask", &softmask::soft_mask);
  m.impl("soft_mask_backward", &softmask::soft_mask_backward);
}
