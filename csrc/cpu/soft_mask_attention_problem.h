// What the CPU kernels of soft_mask_attention read: pairs sorted by image, and tensors by head.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <type_traits>
#include <vector>

#include "rows.h"
#include "simd.h"
#include "types.h"

namespace softmask {

// Pairs by image: those of image b are order[first[b]] up to order[first[b + 1]].
struct ByImage {
  std::vector<int64_t> first, order;

  ByImage(int64_t images, int64_t pairs, const OptionalTensor& kv_index)
      : first(images + 1), order(pairs) {
    if (!kv_index.has_value()) {
      std::iota(first.begin(), first.end(), 0);
      std::iota(order.begin(), order.end(), 0);
      return;
    }
    const at::Tensor image = kv_index->contiguous();
    const int64_t* index = image.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < pairs; ++n) {
      TORCH_CHECK_VALUE(index[n] >= 0 && index[n] < images, "kv_index: expected 0 to ", images - 1,
                        ", got ", index[n]);
      ++first[index[n] + 1];
    }
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t n = 0; n < pairs; ++n) order[next[index[n]]++] = n;
  }
};

// The sum of a row's products with 0: NaN if the row has an infinity or a NaN.
struct TimesZero {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const acc_t* row, int64_t size, acc_t* zero) {
    constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
    simd::Vector<acc_t, Bytes> sums{};
    for (int64_t e = 0; e < size; e += kLanes) {
      sums += simd::load_some<Bytes>(row + e, size - e, acc_t(0)) * acc_t(0);
    }
    *zero = simd::sum_lanes(sums);
  }
};

template <typename acc_t>
bool finite_where_ignored(const at::Tensor& rows, const bool* ignore) {
  const int64_t patches = rows.size(1);
  const acc_t* data = rows.const_data_ptr<acc_t>();
  std::atomic<bool> finite{true};
  at::parallel_for(0, rows.size(0) * patches, 16, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end && finite; ++at) {
      if (!ignore[at]) continue;
      const acc_t* row = data + at / patches * rows.stride(0) + at % patches * rows.stride(1);
      for (int64_t h = 0; h < rows.size(2); ++h) {
        acc_t zero;
        simd::run<TimesZero>(row + h * rows.stride(2), rows.size(3), &zero);
        if (zero != 0) finite = false;
      }
    }
  });
  return finite;
}

// Keys or values [B, P, H, E], finite where they are ignored, because products multiply them
// by their weight, 0, whatever they hold. Copies them only if one is not finite.
inline at::Tensor blank_ignored(const at::Tensor& tensor, const at::Tensor& ignore) {
  if (!ignore.defined()) return tensor;
  const at::Tensor rows = dense_rows(tensor);
  bool finite = true;
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "soft_mask_attention", [&] {
    finite = finite_where_ignored<scalar_t>(rows, ignore.const_data_ptr<bool>());
  });
  return finite ? rows : rows.masked_fill(ignore.unsqueeze(-1).unsqueeze(-1), 0.0);
}

// The rows of one head of a tensor [N, T, H, E].
template <typename T>
struct HeadRows {
  T* data;
  int64_t by_item, by_token;

  static HeadRows of(const at::Tensor& tensor, int64_t head) {
    using scalar_t = std::remove_const_t<T>;
    if constexpr (std::is_const_v<T>) {
      return {tensor.const_data_ptr<scalar_t>() + head * tensor.stride(2), tensor.stride(0),
              tensor.stride(1)};
    } else {
      return {tensor.mutable_data_ptr<scalar_t>() + head * tensor.stride(2), tensor.stride(0),
              tensor.stride(1)};
    }
  }
  SOFTMASK_INLINE T* at(int64_t item, int64_t token = 0) const {
    return data + item * by_item + token * by_token;
  }
};

// All tensors in the compute type, with tokens before heads and contiguous rows: [N, T, H, E],
// [B, P, H, E].
struct SharedAttention {
  ByImage pairs;
  at::Tensor query, key, value;
  at::Tensor weight, ignore;  // [N, P], [B, P]; undefined if not given
  double scale;

  SharedAttention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                  const OptionalTensor& key_weight, const OptionalTensor& kv_index,
                  const OptionalTensor& key_padding_mask, double scale)
      : pairs(images_of(key, query, kv_index), query.size(0), kv_index),
        query(tokens_first(query, compute_type(query, key, value))),
        scale(scale) {
    const at::ScalarType type = this->query.scalar_type();
    if (key_padding_mask.has_value()) ignore = key_padding_mask->contiguous();
    this->key = blank_ignored(tokens_first(key, type), ignore);
    this->value = blank_ignored(tokens_first(value, type), ignore);
    if (!key_weight.has_value()) return;
    weight = key_weight->to(type);
    if (ignore.defined()) {
      const at::Tensor ignored = kv_index.has_value() ? ignore.index_select(0, *kv_index) : ignore;
      weight = weight.masked_fill(ignored, 0.0);
    }
    weight = weight.contiguous();
  }

  static int64_t images_of(const at::Tensor& key, const at::Tensor& query,
                           const OptionalTensor& kv_index) {
    TORCH_CHECK_VALUE(
        kv_index.has_value() ? kv_index->numel() == query.size(0) : key.size(0) == query.size(0),
        "kv_index: expected the image of each of ", query.size(0), " pairs, got ",
        kv_index.has_value() ? kv_index->numel() : key.size(0));
    return key.size(0);
  }
  static at::Tensor tokens_first(const at::Tensor& tensor, at::ScalarType type) {
    return dense_rows(tensor.to(type).transpose(1, 2));
  }
  int64_t images() const { return key.size(0); }
  int64_t patches() const { return key.size(1); }
  int64_t heads() const { return key.size(2); }
  int64_t tokens() const { return query.size(1); }
  int64_t width() const { return key.size(3); }
  int64_t value_width() const { return value.size(3); }

  const bool* ignored_of(int64_t image) const {
    return ignore.defined() ? ignore.const_data_ptr<bool>() + image * patches() : nullptr;
  }
  bool ignores_all(int64_t image) const {
    const bool* row = ignored_of(image);
    return patches() == 0 || (row != nullptr && std::all_of(row, row + patches(),
                                                            [](bool ignored) { return ignored; }));
  }
};

}  // namespace softmask
