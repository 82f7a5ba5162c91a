// Access to tensors [B, H, N, E] by rows of E elements.

#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <type_traits>

#include "vector.h"

namespace softmask {

// A tensor [B, H, N, E] with a contiguous last dimension and any other strides.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;

  SOFTMASK_INLINE T* at(int64_t b, int64_t h, int64_t n) const {
    return data + b * batch + h * head + n * row;
  }
};

template <typename T>
Rows<T> rows_of(const at::Tensor& tensor) {
  if constexpr (std::is_const_v<T>) {
    return {tensor.const_data_ptr<std::remove_const_t<T>>(), tensor.stride(0), tensor.stride(1),
            tensor.stride(2)};
  } else {
    return {tensor.mutable_data_ptr<T>(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
  }
}

inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.numel() == 0 ? tensor : tensor.contiguous();
}

}  // namespace softmask
