// softmask::cuda_soft_mask and its gradient: tensors checked, laid out and handed to the kernels.

#include "soft_mask.h"
#include "tensors.h"

namespace softmask::cuda {
namespace {

// maps as [B, W, P'], its rows contiguous.
at::Tensor by_word(const at::Tensor& maps) {
  TORCH_CHECK_VALUE(maps.dim() == 2 || maps.dim() == 3, "maps: expected 2 or 3 dimensions, got ",
                    maps.sizes());
  return dense_rows(maps.dim() == 3 ? maps : maps.unsqueeze(1));
}

SoftMask problem_of(const at::Tensor& maps, int64_t tokens, int64_t width, at::ScalarType type,
                    double strength, std::string_view normalize, int64_t prefix) {
  TORCH_CHECK_VALUE(prefix >= 0 && maps.size(2) > 0 && prefix + maps.size(2) == tokens,
                    "maps: expected ", tokens - prefix, " patches, got ", maps.sizes());
  SoftMask problem{};
  problem.images = maps.size(0), problem.words = maps.size(1);
  problem.tokens = tokens, problem.width = width, problem.prefix = prefix;
  problem.type = type_of(type), problem.map_type = type_of(maps.scalar_type());
  problem.normalize = normalize_of(normalize);
  problem.strength = static_cast<float>(strength);
  problem.maps = maps.const_data_ptr();
  problem.maps_image = maps.stride(0), problem.maps_word = maps.stride(1);
  return problem;
}

void set_features(SoftMask& problem, const at::Tensor& features) {
  problem.features = features.const_data_ptr();
  problem.features_image = features.stride(0), problem.features_token = features.stride(1);
}

at::Tensor soft_mask(const at::Tensor& features, const at::Tensor& maps, double strength,
                     std::string_view normalize, int64_t num_prefix_tokens) {
  TORCH_CHECK_VALUE(features.dim() == 3 && features.size(0) == maps.size(0), "features: expected [",
                    maps.size(0), ", P, D], got ", features.sizes());
  const OnDevice on_device(features);
  const at::Tensor rows = dense_rows(features), words = by_word(maps);
  SoftMask problem = problem_of(words, features.size(1), features.size(2), features.scalar_type(),
                                strength, normalize, num_prefix_tokens);
  at::DimVector shape(maps.sizes().slice(0, maps.dim() - 1));
  shape.append({features.size(1), features.size(2)});
  const at::Tensor out = at::empty(shape, features.options());
  set_features(problem, rows);
  problem.out = out.mutable_data_ptr();
  launch_soft_mask(problem, on_device.stream());
  on_device.check();
  return out;
}

std::tuple<at::Tensor, at::Tensor> soft_mask_backward(
    const at::Tensor& grad, const std::optional<at::Tensor>& features, const at::Tensor& maps,
    double strength, std::string_view normalize, int64_t num_prefix_tokens, bool features_grad) {
  const OnDevice on_device(grad);
  const at::Tensor words = by_word(maps);
  const at::Tensor d_out = dense_rows(maps.dim() == 3 ? grad : grad.unsqueeze(1));
  const int64_t images = d_out.size(0), tokens = d_out.size(2), width = d_out.size(3);
  SoftMask problem =
      problem_of(words, tokens, width, grad.scalar_type(), strength, normalize, num_prefix_tokens);
  problem.d_out = d_out.const_data_ptr();
  problem.d_out_image = d_out.stride(0), problem.d_out_word = d_out.stride(1);
  problem.d_out_token = d_out.stride(2);
  at::Tensor d_features = at::empty({0}, grad.options()), d_maps = at::empty({0}, maps.options());
  at::Tensor rows, d_norms;
  if (features_grad) {
    d_features = at::empty({images, tokens, width}, grad.options());
    problem.d_features = d_features.mutable_data_ptr();
  }
  if (features.has_value()) {
    rows = dense_rows(*features);
    set_features(problem, rows);
    d_norms = at::empty(words.sizes(), maps.options().dtype(at::kFloat));
    d_maps = at::empty(maps.sizes(), maps.options());
    problem.d_norms = d_norms.mutable_data_ptr<float>(), problem.d_maps = d_maps.mutable_data_ptr();
  }
  launch_soft_mask_backward(problem, on_device.stream());
  on_device.check();
  return {d_features, d_maps};
}

}  // namespace
}  // namespace softmask::cuda

TORCH_LIBRARY_IMPL(softmask, SOFTMASK_DISPATCH, m) {
  m.impl("cuda_soft_mask", &softmask::cuda::soft_mask);
  m.impl("cuda_soft_mask_backward", &softmask::cuda::soft_mask_backward);
}
