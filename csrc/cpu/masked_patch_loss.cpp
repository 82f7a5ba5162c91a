// MAE's reconstruction loss of masked patches and its gradient, on the CPU.
//
// A masked patch's pixels are gathered in the order of the prediction into a buffer that fits the
// cache, normalized and compared. Images are never unfolded, and other patches are not read. The
// backward pass recomputes all of this, so only the inputs are saved.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"

namespace softmask {
namespace {

constexpr double kVarianceEps = 1e-6;  // reference.PATCH_VARIANCE_EPS
constexpr int64_t kChannels = 3;

struct Problem {
  at::Tensor prediction, images, mask;
  int64_t side;  // of a patch, in pixels
  bool normalize;

  int64_t patches() const { return mask.numel(); }
  int64_t pixels() const { return kChannels * side * side; }
};

// Copies the pixels of patch `index` of the batch, ordered by row, column and channel.
template <typename image_t, typename acc_t>
void gather(const Problem& problem, int64_t index, acc_t* to) {
  const at::Tensor& images = problem.images;
  const int64_t side = problem.side, columns = images.size(3) / side,
                per_image = problem.mask.size(1);
  const int64_t patch = index % per_image;
  const auto* corner = images.const_data_ptr<image_t>() + index / per_image * images.stride(0) +
                       patch / columns * side * images.stride(2) +
                       patch % columns * side * images.stride(3);
  const int64_t by_channel = images.stride(1), by_row = images.stride(2),
                by_column = images.stride(3);
  for (int64_t row = 0; row < side; ++row) {
    const image_t* from = corner + row * by_row;
    for (int64_t column = 0; column < side; ++column, from += by_column, to += kChannels) {
      for (int64_t channel = 0; channel < kChannels; ++channel) {
        to[channel] = static_cast<acc_t>(from[channel * by_channel]);
      }
    }
  }
}

template <typename acc_t>
using Gather = void (*)(const Problem&, int64_t, acc_t*);

template <typename acc_t>
Gather<acc_t> gather_of(const at::Tensor& images) {
  Gather<acc_t> chosen = nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, images.scalar_type(),
                                  "masked_patch_loss", [&] { chosen = &gather<scalar_t, acc_t>; });
  return chosen;
}

// values = (values - mean) / sqrt(variance + eps), with the unbiased variance. The mean is that of
// the differences from the first value: a sum of the values themselves would be rounded at their
// magnitude, which is a large error compared with the deviation of a flat patch.
struct Standardize {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* values, int64_t size) {
    const acc_t first = values[0];
    for (int64_t i = 0; i < size; ++i) values[i] -= first;
    const acc_t mean = simd::sum<Bytes>(values, size) / static_cast<acc_t>(size);
    for (int64_t i = 0; i < size; ++i) values[i] -= mean;
    acc_t square;
    simd::dots<Bytes>(&square, values, values, 0, 1, size);
    const acc_t inverse =
        1 / std::sqrt(square / static_cast<acc_t>(size - 1) + static_cast<acc_t>(kVarianceEps));
    for (int64_t i = 0; i < size; ++i) values[i] *= inverse;
  }
};

// target = prediction - target; computes the sum of squares.
struct Difference {
  template <int Bytes, typename acc_t, typename scalar_t>
  static SOFTMASK_INLINE void run(const scalar_t* prediction, acc_t* target, int64_t size,
                                  acc_t* square) {
    for (int64_t i = 0; i < size; ++i) target[i] = static_cast<acc_t>(prediction[i]) - target[i];
    simd::dots<Bytes>(square, target, target, 0, 1, size);
  }
};

// Calls work(patch, prediction - target [pixels], sum of its squares) for masked patches and
// skip(patch) for the others.
template <typename scalar_t, typename acc_t, typename Work, typename Skip>
void for_each_patch(const Problem& problem, const Work& work, const Skip& skip) {
  const Gather<acc_t> gather = gather_of<acc_t>(problem.images);
  const bool* masked = problem.mask.const_data_ptr<bool>();
  const auto* prediction = problem.prediction.const_data_ptr<scalar_t>();
  const int64_t pixels = problem.pixels();
  const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE / pixels);
  at::parallel_for(0, problem.patches(), grain, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> target(pixels);
    for (int64_t index = begin; index < end; ++index) {
      if (!masked[index]) {
        skip(index);
        continue;
      }
      acc_t square;
      gather(problem, index, target.data());
      if (problem.normalize) simd::run<Standardize>(target.data(), pixels);
      simd::run<Difference>(prediction + index * pixels, target.data(), pixels, &square);
      work(index, target.data(), square);
    }
  });
}

// Type of the arithmetic and of the loss.
at::ScalarType loss_type(const at::Tensor& prediction, const at::Tensor& images) {
  const bool wide = prediction.scalar_type() == at::kDouble || images.scalar_type() == at::kDouble;
  return wide ? at::kDouble : at::kFloat;
}

Problem make_problem(const at::Tensor& prediction, const at::Tensor& images, const at::Tensor& mask,
                     int64_t side, bool normalize) {
  TORCH_CHECK_VALUE(side > 0, "patch_size: expected at least 1, got ", side);
  const int64_t patches = images.size(2) / side * (images.size(3) / side);
  TORCH_CHECK_VALUE(mask.size(1) == patches && prediction.size(1) == patches &&
                        prediction.size(2) == kChannels * side * side,
                    "prediction, mask: expected ", patches, " patches of ", kChannels * side * side,
                    ", got ", prediction.sizes(), ", ", mask.sizes());
  const bool widen = loss_type(prediction, images) == at::kDouble;
  const at::Tensor given = widen ? prediction.to(at::kDouble) : prediction;
  return {given.contiguous(), images, mask.contiguous(), side, normalize};
}

at::Tensor masked_patch_loss(const at::Tensor& prediction, const at::Tensor& images,
                             const at::Tensor& mask, int64_t patch_size, bool normalize) {
  const Problem problem = make_problem(prediction, images, mask, patch_size, normalize);
  const at::Tensor loss =
      at::empty(mask.sizes(), prediction.options().dtype(loss_type(prediction, images)));
  const auto pixels = static_cast<double>(problem.pixels());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, problem.prediction.scalar_type(),
                                  "masked_patch_loss", [&] {
                                    using acc_t = at::opmath_type<scalar_t>;
                                    auto* to = loss.mutable_data_ptr<acc_t>();
                                    for_each_patch<scalar_t, acc_t>(
                                        problem,
                                        [&](int64_t index, const acc_t*, acc_t square) {
                                          to[index] = static_cast<acc_t>(square / pixels);
                                        },
                                        [&](int64_t index) { to[index] = 0; });
                                  });
  return loss;
}

at::Tensor masked_patch_loss_backward(const at::Tensor& grad, const at::Tensor& prediction,
                                      const at::Tensor& images, const at::Tensor& mask,
                                      int64_t patch_size, bool normalize) {
  const Problem problem = make_problem(prediction, images, mask, patch_size, normalize);
  const at::Tensor gradient = at::empty(prediction.sizes(), problem.prediction.options());
  const at::Tensor upstream = grad.contiguous();
  const int64_t pixels = problem.pixels();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, problem.prediction.scalar_type(), "masked_patch_loss_backward",
      [&] {
        using acc_t = at::opmath_type<scalar_t>;
        auto* to = gradient.mutable_data_ptr<scalar_t>();
        const auto* from = upstream.const_data_ptr<acc_t>();
        for_each_patch<scalar_t, acc_t>(
            problem,
            [&](int64_t index, const acc_t* difference, acc_t) {
              const acc_t factor = from[index] * 2 / static_cast<acc_t>(pixels);
              simd::run<simd::ScaleRow>(difference, factor, to + index * pixels, pixels);
            },
            [&](int64_t index) { std::fill_n(to + index * pixels, pixels, scalar_t(0)); });
      });
  return gradient.to(prediction.scalar_type());
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("masked_patch_loss", &softmask::masked_patch_loss);
  m.impl("masked_patch_loss_backward", &softmask::masked_patch_loss_backward);
}
