// Tensors as the kernels take them, and the device and stream that kernels run on. Without CUDA,
// for tests, the same operators are compiled for CPU tensors.

#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <initializer_list>
#include <optional>
#include <string_view>

#include "types.h"

#ifdef SOFTMASK_ON_HOST
#define SOFTMASK_DISPATCH CPU
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define SOFTMASK_DISPATCH CUDA
#endif

namespace softmask::cuda {

using OptionalTensor = std::optional<at::Tensor>;

// Makes a tensor's device the current one while it lives.
class OnDevice {
 public:
#ifdef SOFTMASK_ON_HOST
  explicit OnDevice(const at::Tensor&) {}
  Stream stream() const { return {}; }
  void check() const {}
#else
  explicit OnDevice(const at::Tensor& tensor) : guard_(tensor.device()) {}
  Stream stream() const { return c10::cuda::getCurrentCUDAStream(); }
  void check() const { C10_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  c10::cuda::CUDAGuard guard_;
#endif
};

inline Type type_of(at::ScalarType type) {
  if (type == at::kFloat) return Type::kFloat;
  if (type == at::kHalf) return Type::kHalf;
  TORCH_CHECK_VALUE(type == at::kBFloat16, "expected fp32, fp16 or bf16, got ", type);
  return Type::kBFloat16;
}

// The type that all tensors share, fp32 if they differ.
inline at::ScalarType common_type(const std::initializer_list<OptionalTensor>& tensors) {
  std::optional<at::ScalarType> type;
  for (const OptionalTensor& tensor : tensors) {
    if (!tensor.has_value()) continue;
    if (type.has_value() && *type != tensor->scalar_type()) return at::kFloat;
    type = tensor->scalar_type();
  }
  return *type;
}

inline Normalize normalize_of(std::string_view name) {
  if (name == "none") return Normalize::kNone;
  if (name == "minmax") return Normalize::kMinmax;
  if (name == "max") return Normalize::kMax;
  TORCH_CHECK_VALUE(name == "sum", "normalize: expected none, minmax, max or sum, got ", name);
  return Normalize::kSum;
}

// The tensor itself if its last dimension is contiguous in memory, else a copy.
inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

inline Rows rows_of(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

}  // namespace softmask::cuda
