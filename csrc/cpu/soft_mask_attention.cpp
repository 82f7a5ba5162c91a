// Attention to image tokens that pairs share, with each pair's own weights, and its gradients, on
// the CPU.
//
// The weights commute with the projections: logits are scale * m_p (q k_p^T), the output is sum_p
// a_p m_p v_p. So all pairs of an image use its keys and values, packed once per head, and their
// gradients are summed per image: no tensor holds image tokens per pair. Some hundred query rows
// are taken from their pairs at a time, and their logits stay in the cache until they are used. One
// thread handles a head of an image, with its pairs in order, so the number of threads does not
// change the result.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "products.h"
#include "soft_mask_attention_problem.h"

namespace softmask {
namespace {

using products::Multiply;
using products::Pack;
using products::Product;

constexpr int64_t kRows = 256;  // query rows whose logits are in the cache together

// Turns a row of scaled products into the softmax over the keys that are not ignored.
struct Softmax {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* row, int64_t size, const acc_t* weight,
                                  const bool* ignore) {
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

// The memory of one thread: packed right sides of products with an image's keys and values, and
// rows of some of its pairs.
template <typename acc_t>
struct Room {
  int64_t pitch;                                                     // of logits and gradient
  std::vector<acc_t> keys, values, keys_by_patch, values_by_column;  // packed
  std::vector<acc_t> query, upstream, out, packed, attention, gradient;

  Room(const SharedAttention& problem, int64_t rows, bool backward)
      : pitch(padded(problem.patches())),
        keys(pitch * problem.width()),
        values(problem.patches() * padded(problem.value_width())),
        query(rows * problem.width()),
        out(rows * std::max(problem.width(), problem.value_width())),
        attention(rows * pitch) {
    if (!backward) return;
    keys_by_patch.resize(problem.patches() * padded(problem.width()));
    values_by_column.resize(pitch * problem.value_width());
    upstream.resize(rows * problem.value_width());
    packed.resize(rows * padded(std::max(problem.width(), problem.value_width())));
    gradient.resize(rows * pitch);
  }
  static int64_t padded(int64_t size) { return products::padded<acc_t>(size); }
};

// Some pairs of an image, at one head.
template <typename acc_t>
struct Chunk {
  const int64_t* pairs;
  int64_t count, tokens, patches, width, value_width;
  const acc_t *key, *value;  // rows of the image, [P, E], [P, V]
  int64_t by_key, by_value;  // from row to row
  const acc_t* weights;      // [N, P] or null
  const bool* ignore;        // [P] or null
  acc_t scale;

  Chunk(const SharedAttention& problem, int64_t image, int64_t head)
      : pairs(nullptr),
        count(0),
        tokens(problem.tokens()),
        patches(problem.patches()),
        width(problem.width()),
        value_width(problem.value_width()),
        key(HeadRows<const acc_t>::of(problem.key, head).at(image)),
        value(HeadRows<const acc_t>::of(problem.value, head).at(image)),
        by_key(problem.key.stride(1)),
        by_value(problem.value.stride(1)),
        weights(problem.weight.defined() ? problem.weight.const_data_ptr<acc_t>() : nullptr),
        ignore(problem.ignored_of(image)),
        scale(static_cast<acc_t>(problem.scale)) {}

  SOFTMASK_INLINE int64_t rows() const { return count * tokens; }
  SOFTMASK_INLINE const acc_t* weight_of(int64_t row) const {
    return weights == nullptr ? nullptr : weights + pairs[row / tokens] * patches;
  }
  // Copies the pairs' rows to a matrix [rows, size].
  SOFTMASK_INLINE void gather(const HeadRows<const acc_t>& from, int64_t size, acc_t* to) const {
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t t = 0; t < tokens; ++t, to += size) {
        std::copy_n(from.at(pairs[n], t), size, to);
      }
    }
  }
  // Copies a matrix [rows, size] to the pairs' rows, with `bias` added if there is one.
  SOFTMASK_INLINE void scatter(const acc_t* from, int64_t size, const acc_t* bias,
                               const HeadRows<acc_t>& to) const {
    for (int64_t n = 0; n < count; ++n) {
      for (int64_t t = 0; t < tokens; ++t, from += size) {
        acc_t* row = to.at(pairs[n], t);
        for (int64_t e = 0; e < size; ++e) row[e] = bias == nullptr ? from[e] : from[e] + bias[e];
      }
    }
  }
};

// Packs an image's keys and values for the products of the forward pass, or of both.
struct PackImage {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Chunk<acc_t>& chunk, Room<acc_t>& room) {
    const int64_t patches = chunk.patches, width = chunk.width, columns = chunk.value_width;
    Pack::run<Bytes>(chunk.key, chunk.by_key, int64_t(1), patches, width, room.keys.data());
    Pack::run<Bytes>(chunk.value, int64_t(1), chunk.by_value, columns, patches, room.values.data());
    if (room.gradient.empty()) return;
    Pack::run<Bytes>(chunk.key, int64_t(1), chunk.by_key, width, patches,
                     room.keys_by_patch.data());
    Pack::run<Bytes>(chunk.value, chunk.by_value, int64_t(1), patches, columns,
                     room.values_by_column.data());
  }
};

// Computes the pairs' attention [rows, P], not yet weighted.
template <int Bytes, typename acc_t>
SOFTMASK_INLINE void attend(const Chunk<acc_t>& chunk, const HeadRows<const acc_t>& query,
                            Room<acc_t>& room) {
  chunk.gather(query, chunk.width, room.query.data());
  acc_t* attention = room.attention.data();
  Multiply::run<Bytes>(Product<acc_t>{attention, room.pitch, /*add=*/false, chunk.scale,
                                      room.query.data(), chunk.width, 1, room.keys.data(),
                                      chunk.rows(), chunk.patches, chunk.width});
  for (int64_t i = 0; i < chunk.rows(); ++i) {
    Softmax::run<Bytes>(attention + i * room.pitch, chunk.patches, chunk.weight_of(i),
                        chunk.ignore);
  }
}

struct Forward {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Chunk<acc_t>& chunk, const HeadRows<const acc_t>& query,
                                  const acc_t* bias, const HeadRows<acc_t>& to, Room<acc_t>& room) {
    attend<Bytes>(chunk, query, room);
    acc_t *attention = room.attention.data(), *out = room.out.data();
    for (int64_t i = 0; i < chunk.rows() && chunk.weights != nullptr; ++i) {
      Weigh::run<Bytes>(attention + i * room.pitch, chunk.patches, chunk.weight_of(i));
    }
    Multiply::run<Bytes>(Product<acc_t>{out, chunk.value_width, /*add=*/false, acc_t(1), attention,
                                        room.pitch, 1, room.values.data(), chunk.rows(),
                                        chunk.value_width, chunk.patches});
    chunk.scatter(out, chunk.value_width, bias, to);
  }
};

// Gradients at one head of an image; key and value [P, E], [P, V] and bias [V] are sums over pairs.
template <typename acc_t>
struct HeadGradients {
  HeadRows<acc_t> query;
  acc_t *key, *value, *bias;  // bias may be null
  int64_t by_key, by_value;
};

struct Backward {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Chunk<acc_t>& chunk, const HeadRows<const acc_t>& query,
                                  const HeadRows<const acc_t>& grad, bool first,
                                  const HeadGradients<acc_t>& to, Room<acc_t>& room) {
    attend<Bytes>(chunk, query, room);
    const int64_t rows = chunk.rows(), patches = chunk.patches, pitch = room.pitch,
                  width = chunk.width, columns = chunk.value_width;
    acc_t *attention = room.attention.data(), *gradient = room.gradient.data(),
          *upstream = room.upstream.data(), *out = room.out.data(), *packed = room.packed.data();
    chunk.gather(grad, columns, upstream);
    Multiply::run<Bytes>(Product<acc_t>{gradient, pitch, /*add=*/false, acc_t(1), upstream, columns,
                                        1, room.values_by_column.data(), rows, patches, columns});
    for (int64_t i = 0; i < rows; ++i) {
      SoftmaxGradient::run<Bytes>(gradient + i * pitch, attention + i * pitch, patches, chunk.scale,
                                  chunk.weight_of(i));
    }
    Multiply::run<Bytes>(Product<acc_t>{out, width, /*add=*/false, acc_t(1), gradient, pitch, 1,
                                        room.keys_by_patch.data(), rows, width, patches});
    chunk.scatter(out, width, nullptr, to.query);
    Pack::run<Bytes>(room.query.data(), int64_t(1), width, width, rows, packed);
    Multiply::run<Bytes>(Product<acc_t>{to.key, to.by_key, /*add=*/!first, acc_t(1), gradient, 1,
                                        pitch, packed, patches, width, rows});
    Pack::run<Bytes>(upstream, int64_t(1), columns, columns, rows, packed);
    Multiply::run<Bytes>(Product<acc_t>{to.value, to.by_value, /*add=*/!first, acc_t(1), attention,
                                        1, pitch, packed, patches, columns, rows});
    if (to.bias == nullptr) return;
    for (int64_t e = 0; e < columns; ++e) out[e] = 0;  // a sum of its own is more precise
    for (int64_t i = 0; i < rows; ++i)
      simd::add_scaled(out, upstream + i * columns, acc_t(1), columns);
    simd::add_scaled(to.bias, out, acc_t(1), columns);
  }
};

// Calls work(image, head, its pairs' chunk, room) for some pairs after others, `first` being true
// for the first of them, and nothing(image, head) where no pair reads a token. Tasks run through
// images first, then heads, so that an image with many pairs is spread over all threads.
template <typename acc_t, typename Work, typename Nothing>
void for_each_chunk(const SharedAttention& problem, bool backward, const Work& work,
                    const Nothing& nothing) {
  const int64_t images = problem.images(), tokens = problem.tokens();
  const int64_t together = std::max<int64_t>(1, kRows / std::max<int64_t>(1, tokens));
  at::parallel_for(0, problem.heads() * images, 1, [&](int64_t begin, int64_t end) {
    Room<acc_t> room(problem, together * tokens, backward);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task % images, head = task / images;
      const int64_t first = problem.pairs.first[image], last = problem.pairs.first[image + 1];
      if (first == last || tokens == 0 || problem.ignores_all(image)) {
        nothing(image, head);
        continue;
      }
      Chunk<acc_t> chunk(problem, image, head);
      simd::run<PackImage>(chunk, room);
      for (int64_t at = first; at < last; at += together) {
        chunk.pairs = problem.pairs.order.data() + at;
        chunk.count = std::min(last - at, together);
        work(image, head, chunk, at == first, room);
      }
    }
  });
}

// Sets the rows of an image's pairs to zero, at one head.
template <typename acc_t>
void clear_pairs(const SharedAttention& problem, int64_t image, const HeadRows<acc_t>& rows,
                 int64_t size) {
  for (int64_t at = problem.pairs.first[image]; at < problem.pairs.first[image + 1]; ++at) {
    for (int64_t t = 0; t < problem.tokens(); ++t) {
      std::fill_n(rows.at(problem.pairs.order[at], t), size, acc_t(0));
    }
  }
}

at::Tensor soft_mask_attention(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& key_weight,
                               const OptionalTensor& kv_index, const OptionalTensor& value_bias,
                               const OptionalTensor& key_padding_mask, double scale) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // or autograd would take the result for a view
  const SharedAttention problem(query, key, value, key_weight, kv_index, key_padding_mask, scale);
  const int64_t width = problem.value_width();
  const at::Tensor output = at::empty({query.size(0), query.size(2), query.size(1), width},
                                      problem.query.options());  // [N, T, H, V]
  at::Tensor bias;
  if (value_bias.has_value()) bias = value_bias->to(problem.query.scalar_type()).contiguous();
  AT_DISPATCH_FLOATING_TYPES(problem.query.scalar_type(), "soft_mask_attention", [&] {
    const scalar_t* biases = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    for_each_chunk<scalar_t>(
        problem, /*backward=*/false,
        [&](int64_t, int64_t head, const Chunk<scalar_t>& chunk, bool, Room<scalar_t>& room) {
          simd::run<Forward>(chunk, HeadRows<const scalar_t>::of(problem.query, head),
                             biases == nullptr ? nullptr : biases + head * width,
                             HeadRows<scalar_t>::of(output, head), room);
        },
        [&](int64_t image, int64_t head) {
          clear_pairs(problem, image, HeadRows<scalar_t>::of(output, head), width);
        });
  });
  return output.to(query.scalar_type()).transpose(1, 2);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> soft_mask_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& key_weight, const OptionalTensor& kv_index,
    const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale) {
  const SharedAttention problem(query, key, value, key_weight, kv_index, key_padding_mask, scale);
  const auto options = problem.query.options();
  const at::Tensor to_query = at::empty(problem.query.sizes(), options),
                   to_key = at::zeros(problem.key.sizes(), options),
                   to_value = at::zeros(problem.value.sizes(), options),
                   to_bias = at::zeros({value_bias.has_value() ? problem.images() : 0,
                                        problem.heads(), problem.value_width()},
                                       options);  // per image
  const at::Tensor upstream = problem.tokens_first(grad, problem.query.scalar_type());
  AT_DISPATCH_FLOATING_TYPES(problem.query.scalar_type(), "soft_mask_attention_backward", [&] {
    scalar_t* biases = value_bias.has_value() ? to_bias.mutable_data_ptr<scalar_t>() : nullptr;
    for_each_chunk<scalar_t>(
        problem, /*backward=*/true,
        [&](int64_t image, int64_t head, const Chunk<scalar_t>& chunk, bool first,
            Room<scalar_t>& room) {
          const int64_t row = image * problem.heads() + head;
          const HeadGradients<scalar_t> to{
              HeadRows<scalar_t>::of(to_query, head),
              HeadRows<scalar_t>::of(to_key, head).at(image),
              HeadRows<scalar_t>::of(to_value, head).at(image),
              biases == nullptr ? nullptr : biases + row * problem.value_width(),
              to_key.stride(1),
              to_value.stride(1)};
          simd::run<Backward>(chunk, HeadRows<const scalar_t>::of(problem.query, head),
                              HeadRows<const scalar_t>::of(upstream, head), first, to, room);
        },
        [&](int64_t image, int64_t head) {
          clear_pairs(problem, image, HeadRows<scalar_t>::of(to_query, head), problem.width());
        });
  });
  const auto finish = [](const at::Tensor& tensor, const at::Tensor& like) {
    return tensor.to(like.scalar_type()).transpose(1, 2);
  };
  const at::Tensor bias =
      value_bias.has_value() ? to_bias.sum(0).to(value_bias->scalar_type()) : to_bias;
  return {finish(to_query, query), finish(to_key, key), finish(to_value, value), bias};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("soft_mask_attention", &softmask::soft_mask_attention);
  m.impl("soft_mask_attention_backward", &softmask::soft_mask_attention_backward);
}
