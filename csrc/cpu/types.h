// Types that the kernels share.

#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace softmask {

using OptionalTensor = std::optional<at::Tensor>;

// Of the arithmetic: float, or double for double.
inline at::ScalarType compute_type(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace softmask
