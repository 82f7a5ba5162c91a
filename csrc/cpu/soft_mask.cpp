// out = features * (1 - strength * norm(map)) and its gradients, on the CPU.
//
// A map is read in double precision whatever its type: it is 1/D of the features. One pass over the
// features does the rest; products are taken in float (double for double), sums in double.

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

  int64_t grain() const {  // rows of tokens that are worth a thread
    return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, width));
  }
  int64_t map_grain() const {
    return std::max<int64_t>(1, at::internal::GRAIN_SIZE / std::max<int64_t>(1, patches));
  }
};

at::Tensor rows_contiguous(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

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
          for (int64_t d = 0; d < sizes.width; ++d) {
            to[d] = static_cast<scalar_t>(static_cast<acc_t>(from[d]) * w);
          }
        }
      });
}

// d features[b, p] = sum over words of grad[b, w, p] * weight[b, w, p]; grad is [B, W, P, D].
template <typename scalar_t>
void features_backward_kernel(const at::Tensor& grad, const at::Tensor& weights, const Sizes& sizes,
                              at::Tensor& features_grad) {
  const scalar_t* upstream = grad.const_data_ptr<scalar_t>();
  const double* weight = weights.const_data_ptr<double>();
  scalar_t* output = features_grad.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, sizes.batch * sizes.tokens, sizes.grain(), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(sizes.width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / sizes.tokens, token = row % sizes.tokens;
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t word = 0; word < sizes.words; ++word) {
        const scalar_t* from =
            upstream + image * grad.stride(0) + word * grad.stride(1) + token * grad.stride(2);
        const int64_t patch = (image * sizes.words + word) * sizes.patches + token - sizes.prefix;
        const double w = token < sizes.prefix ? 1.0 : weight[patch];
        for (int64_t d = 0; d < sizes.width; ++d) sum[d] += static_cast<double>(from[d]) * w;
      }
      scalar_t* to = output + row * sizes.width;
      for (int64_t d = 0; d < sizes.width; ++d) to[d] = static_cast<scalar_t>(sum[d]);
    }
  });
}

template <typename scalar_t>
double dot(const scalar_t* left, const scalar_t* right, int64_t size) {
  constexpr int64_t kLanes = 8;  // independent sums, which the compiler can vectorize
  double lanes[kLanes] = {};
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += static_cast<double>(left[d + lane]) * static_cast<double>(right[d + lane]);
    }
  }
  double sum = 0.0;
  for (; d < size; ++d) sum += static_cast<double>(left[d]) * static_cast<double>(right[d]);
  for (double lane : lanes) sum += lane;
  return sum;
}

// d norm(map) = -strength * <grad, features> per patch, then through the normalization.
template <typename scalar_t>
void maps_backward_kernel(const at::Tensor& grad, const at::Tensor& features,
                          const at::Tensor& maps, const Sizes& sizes, double strength,
                          Normalize mode, at::Tensor& maps_grad) {
  const scalar_t* upstream = grad.const_data_ptr<scalar_t>();
  const scalar_t* feature = features.const_data_ptr<scalar_t>();
  const double* map = maps.const_data_ptr<double>();
  double* output = maps_grad.mutable_data_ptr<double>();
  const int64_t size = sizes.patches;
  at::parallel_for(
      0, sizes.batch * sizes.words * size, sizes.grain(), [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
          const int64_t row = at / size, token = at % size + sizes.prefix;
          const int64_t image = row / sizes.words, word = row % sizes.words;
          const scalar_t* g =
              upstream + image * grad.stride(0) + word * grad.stride(1) + token * grad.stride(2);
          const scalar_t* x = feature + image * features.stride(0) + token * features.stride(1);
          output[at] = -strength * dot(g, x, sizes.width);
        }
      });
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
  const at::Tensor rows = rows_contiguous(features);
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
  const at::Tensor rows = rows_contiguous(maps.dim() == 3 ? grad : grad.unsqueeze(1));
  at::Tensor to_features = at::empty({0}, grad.options());
  at::Tensor to_maps = at::empty({0}, maps.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "soft_mask_backward", [&] {
        if (features_grad) {
          to_features = at::empty({sizes.batch, sizes.tokens, sizes.width}, grad.options());
          const at::Tensor weights = map_weights(maps_double, sizes, strength, mode);
          features_backward_kernel<scalar_t>(rows, weights, sizes, to_features);
        }
        if (features.has_value()) {
          at::Tensor maps_grad = at::empty_like(maps_double);
          maps_backward_kernel<scalar_t>(rows, rows_contiguous(*features), maps_double, sizes,
                                         strength, mode, maps_grad);
          to_maps = maps_grad.to(maps.scalar_type());
        }
      });
  return {to_features, to_maps};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("soft_mask", &softmask::soft_mask);
  m.impl("soft_mask_backward", &softmask::soft_mask_backward);
}
