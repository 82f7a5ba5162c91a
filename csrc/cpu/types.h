// Types that the kernels share.

#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace softmask {

using OptionalTensor = std::optional<at::Tensor>;

inline bool has_type(const at::Tensor& tensor, at::ScalarType type) {
  return tensor.scalar_type() == type;
}
inline bool has_type(const OptionalTensor& tensor, at::ScalarType type) {
  return tensor.has_value() && tensor->scalar_type() == type;
}

// The type to compute in: double if any tensor is double, float otherwise.
template <typename... Tensors>
at::ScalarType compute_type(const Tensors&... tensors) {
  return (has_type(tensors, at::kDouble) || ...) ? at::kDouble : at::kFloat;
}

// The type shared by all tensors that are given, or the type to compute in if they differ.
template <typename... Tensors>
at::ScalarType common_type(const at::Tensor& first, const Tensors&... others) {
  const at::ScalarType type = first.scalar_type();
  const auto is_other = [&](const OptionalTensor& tensor) {
    return tensor.has_value() && !has_type(tensor, type);
  };
  return (is_other(others) || ...) ? compute_type(first, others...) : type;
}

}  // namespace softmask
