// Attention to image tokens that pairs share, with each pair's own weights, and its gradients, on
// the CPU.
//
// The weights commute with the projections: logits are scale * m_p (q k_p^T), the output is sum_p
// a_p m_p v_p. So all pairs of an image use its keys and values in place (half types are converted
// once), in one product per head by torch's BLAS, and their gradients are summed per image: no
// tensor holds image tokens per pair. One thread handles a head of an image, with its pairs in
// order, so the number of threads does not change the result, except for a single head of a single
// image, whose product BLAS splits.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

#include "rows.h"
#include "simd.h"
#include "types.h"

namespace softmask {
namespace {

constexpr int64_t kRows = 256;  // query rows per product with an image's keys

// Pairs sorted by image: those of image b are first[b] up to first[b + 1].
struct ByImage {
  std::vector<int64_t> first;
  OptionalTensor order;  // original indices of the pairs, [N]; none if they were sorted

  ByImage(int64_t images, int64_t pairs, const OptionalTensor& kv_index) : first(images + 1) {
    if (!kv_index.has_value()) {
      std::iota(first.begin(), first.end(), 0);
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
    if (!std::is_sorted(index, index + pairs)) order = at::argsort(image, /*stable=*/true);
  }

  at::Tensor sort(const at::Tensor& by_pair) const {
    return order ? by_pair.index_select(0, *order) : by_pair;
  }
  at::Tensor unsort(const at::Tensor& by_image) const {
    return order ? at::empty_like(by_image).index_copy_(0, *order, by_image) : by_image;
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

// Keys or values [B, P, H, E], finite where they are ignored, because BLAS multiplies them by their
// weight, 0, whatever they hold. Copies them only if one is not finite.
at::Tensor blank_ignored(const at::Tensor& tensor, const at::Tensor& ignore) {
  if (!ignore.defined()) return tensor;
  const at::Tensor rows = dense_rows(tensor);
  bool finite = true;
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "soft_mask_attention", [&] {
    finite = finite_where_ignored<scalar_t>(rows, ignore.const_data_ptr<bool>());
  });
  return finite ? rows : rows.masked_fill(ignore.unsqueeze(-1).unsqueeze(-1), 0.0);
}

// All tensors in the compute type, with pairs sorted by image and tokens before heads:
// [N, T, H, E], [B, P, H, E].
struct Problem {
  ByImage pairs;
  at::Tensor query, key, value;
  at::Tensor weight, ignore;  // [N, P], [B, P]; undefined if not given
  double scale;

  Problem(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
          const OptionalTensor& key_weight, const OptionalTensor& kv_index,
          const OptionalTensor& key_padding_mask, double scale)
      : pairs(images_of(key, query, kv_index), query.size(0), kv_index),
        query(pairs.sort(tokens_first(query, compute_type(query, key, value)))),
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
    weight = pairs.sort(weight).contiguous();
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
    return tensor.to(type).transpose(1, 2);
  }
  int64_t images() const { return key.size(0); }
  int64_t patches() const { return key.size(1); }
  int64_t heads() const { return key.size(2); }
  int64_t tokens() const { return query.size(1); }
  int64_t chunk() const {  // in pairs
    return std::max<int64_t>(1, kRows / std::max<int64_t>(1, tokens()));
  }
  bool ignores_all(int64_t image) const {
    if (!ignore.defined()) return patches() == 0;
    const bool* row = ignore.const_data_ptr<bool>() + image * patches();
    return std::all_of(row, row + patches(), [](bool ignored) { return ignored; });
  }
};

// Pairs [begin, end) of an image, at one head.
struct Chunk {
  int64_t image, head, begin, end;

  // The pairs' rows of [N, T, H, E] as a matrix [pairs * T, E].
  at::Tensor rows(const at::Tensor& tensor) const {
    return tensor.narrow(0, begin, end - begin).select(2, head).flatten(0, 1);
  }
  at::Tensor of_image(const at::Tensor& tensor) const {
    return tensor.select(0, image).select(1, head);
  }  // [P, E]
};

// Turns a row of products into the softmax over the keys that are not ignored.
struct Softmax {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* row, int64_t size, acc_t scale, const acc_t* weight,
                                  const bool* ignore) {
    for (int64_t p = 0; p < size; ++p) row[p] *= scale;
    if (weight != nullptr) {
      for (int64_t p = 0; p < size; ++p) row[p] *= weight[p];
    }
    if (ignore != nullptr) {
      for (int64_t p = 0; p < size; ++p) row[p] = ignore[p] ? simd::kLowest<acc_t> : row[p];
    }
    simd::softmax<Bytes>(row, size);
  }
};

struct Weigh {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* row, int64_t size, const acc_t* weight) {
    for (int64_t p = 0; p < size; ++p) row[p] *= weight[p];
  }
};

// Turns the gradient with respect to the weighted attention into the gradient with respect to the
// products, and weights the attention.
struct SoftmaxGradient {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* gradient, acc_t* attention, int64_t size, acc_t scale,
                                  const acc_t* weight) {
    if (weight != nullptr) {
      for (int64_t p = 0; p < size; ++p) gradient[p] *= weight[p];
    }
    acc_t total;
    simd::dots<Bytes>(&total, attention, gradient, 0, 1, size);
    for (int64_t p = 0; p < size; ++p) gradient[p] = attention[p] * (gradient[p] - total) * scale;
    if (weight == nullptr) return;
    for (int64_t p = 0; p < size; ++p) {
      gradient[p] *= weight[p];
      attention[p] *= weight[p];
    }
  }
};

// Calls row(i, weights of its pair, or null) for each row of the chunk.
template <typename acc_t, typename Row>
void for_each_row(const Problem& problem, const Chunk& chunk, const Row& row) {
  const acc_t* weights =
      problem.weight.defined() ? problem.weight.const_data_ptr<acc_t>() : nullptr;
  for (int64_t pair = chunk.begin, i = 0; pair < chunk.end; ++pair) {
    for (int64_t t = 0; t < problem.tokens(); ++t, ++i) {
      row(i, weights == nullptr ? nullptr : weights + pair * problem.patches());
    }
  }
}

// Computes the chunk's attention [rows, P], not yet weighted, into `to`.
template <typename acc_t>
void attend(const Problem& problem, const Chunk& chunk, const at::Tensor& query, at::Tensor& to) {
  at::mm_out(to, query, chunk.of_image(problem.key).t());
  auto* data = to.mutable_data_ptr<acc_t>();
  const int64_t size = problem.patches();
  const auto scale = static_cast<acc_t>(problem.scale);
  const bool* ignore = problem.ignore.defined()
                           ? problem.ignore.const_data_ptr<bool>() + chunk.image * size
                           : nullptr;
  for_each_row<acc_t>(problem, chunk, [&](int64_t i, const acc_t* weight) {
    simd::run<Softmax>(data + i * size, size, scale, weight, ignore);
  });
}

// Calls work(chunk, two scratch matrices [rows, P]) on all chunks. Tasks run through images first,
// then heads, so that an image with many pairs is spread over all threads.
template <typename Work>
void for_each_chunk(const Problem& problem, const Work& work) {
  const int64_t images = problem.images();
  at::parallel_for(0, problem.heads() * images, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // thread-local
    const at::Tensor scratch = at::empty({2, problem.chunk() * problem.tokens(), problem.patches()},
                                         problem.query.options());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task % images, last = problem.pairs.first[image + 1];
      for (int64_t at = problem.pairs.first[image]; at < last; at += problem.chunk()) {
        const Chunk chunk{image, task / images, at, std::min(last, at + problem.chunk())};
        const int64_t rows = (chunk.end - chunk.begin) * problem.tokens();
        if (rows > 0) work(chunk, scratch[0].narrow(0, 0, rows), scratch[1].narrow(0, 0, rows));
      }
    }
  });
}

at::Tensor soft_mask_attention(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& key_weight,
                               const OptionalTensor& kv_index, const OptionalTensor& value_bias,
                               const OptionalTensor& key_padding_mask, double scale) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // or autograd would take the result for a view
  const Problem problem(query, key, value, key_weight, kv_index, key_padding_mask, scale);
  const at::Tensor output = at::empty({query.size(0), query.size(2), query.size(1), value.size(3)},
                                      problem.query.options());  // [N, T, H, V]
  const at::Tensor bias =
      value_bias.has_value() ? value_bias->to(problem.query.scalar_type()) : at::Tensor();
  AT_DISPATCH_FLOATING_TYPES(problem.query.scalar_type(), "soft_mask_attention", [&] {
    for_each_chunk(problem, [&](const Chunk& chunk, at::Tensor attention, const at::Tensor&) {
      at::Tensor rows = output.narrow(0, chunk.begin, chunk.end - chunk.begin)
                            .select(2, chunk.head);  // [pairs, T, V]
      if (problem.ignores_all(chunk.image)) {
        rows.zero_();
        return;
      }
      attend<scalar_t>(problem, chunk, chunk.rows(problem.query), attention);
      auto* data = attention.mutable_data_ptr<scalar_t>();
      for_each_row<scalar_t>(problem, chunk, [&](int64_t i, const scalar_t* weight) {
        if (weight != nullptr)
          simd::run<Weigh>(data + i * problem.patches(), problem.patches(), weight);
      });
      at::Tensor matrix = rows.view({attention.size(0), value.size(3)});
      at::mm_out(matrix, attention, chunk.of_image(problem.value));
      if (bias.defined()) matrix.add_(bias[chunk.head]);
    });
  });
  return problem.pairs.unsort(output).to(query.scalar_type()).transpose(1, 2);
}

// Gradients of query, key, value and value_bias, the last per image, [B, H, V].
struct Gradients {
  at::Tensor query, key, value, bias;

  Gradients(const Problem& problem, bool with_bias)
      : query(at::zeros(problem.query.sizes(), problem.query.options())),
        key(at::zeros(problem.key.sizes(), problem.query.options())),
        value(at::zeros(problem.value.sizes(), problem.query.options())),
        bias(at::zeros({with_bias ? problem.images() : 0, problem.heads(), problem.value.size(3)},
                       problem.query.options())) {}
};

template <typename acc_t>
void add_gradients(const Problem& problem, const Chunk& chunk, const at::Tensor& grad,
                   at::Tensor attention, at::Tensor gradient, const Gradients& to) {
  const at::Tensor query = chunk.rows(problem.query), upstream = chunk.rows(grad);
  attend<acc_t>(problem, chunk, query, attention);
  at::mm_out(gradient, upstream, chunk.of_image(problem.value).t());
  auto *weighed = attention.mutable_data_ptr<acc_t>(),
       *at_products = gradient.mutable_data_ptr<acc_t>();
  const int64_t size = problem.patches();
  const auto scale = static_cast<acc_t>(problem.scale);
  for_each_row<acc_t>(problem, chunk, [&](int64_t i, const acc_t* weight) {
    simd::run<SoftmaxGradient>(at_products + i * size, weighed + i * size, size, scale, weight);
  });
  at::Tensor rows = to.query.narrow(0, chunk.begin, chunk.end - chunk.begin).select(2, chunk.head);
  at::Tensor matrix = rows.view({attention.size(0), query.size(1)});
  at::mm_out(matrix, gradient, chunk.of_image(problem.key));
  chunk.of_image(to.key).addmm_(gradient.t(), query);
  chunk.of_image(to.value).addmm_(attention.t(), upstream);
  if (to.bias.numel() > 0) to.bias[chunk.image][chunk.head].add_(upstream.sum(0));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_mask_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& key_weight, const OptionalTensor& kv_index,
    const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale) {
  const Problem problem(query, key, value, key_weight, kv_index, key_padding_mask, scale);
  const Gradients to(problem, value_bias.has_value());
  const at::Tensor upstream =
      problem.pairs.sort(problem.tokens_first(grad, problem.query.scalar_type()));
  AT_DISPATCH_FLOATING_TYPES(problem.query.scalar_type(), "soft_mask_attention_backward", [&] {
    for_each_chunk(
        problem, [&](const Chunk& chunk, const at::Tensor& attention, const at::Tensor& gradient) {
          if (problem.ignores_all(chunk.image)) return;
          add_gradients<scalar_t>(problem, chunk, upstream, attention, gradient, to);
        });
  });
  const auto finish = [](const at::Tensor& tensor, const at::Tensor& like) {
    return tensor.to(like.scalar_type()).transpose(1, 2);
  };
  const at::Tensor bias =
      value_bias.has_value() ? to.bias.sum(0).to(value_bias->scalar_type()) : to.bias;
  return {finish(problem.pairs.unsort(to.query), query), finish(to.key, key),
          finish(to.value, value), bias};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("soft_mask_attention", &softmask::soft_mask_attention);
  m.impl("soft_mask_attention_backward", &softmask::soft_mask_attention_backward);
}
