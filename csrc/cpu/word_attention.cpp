// Attention maps of words: the mean over heads and sub-tokens of A * relu(dO (v + bias)^T), or of A
// alone, at the words' rows, with A = softmax(scale * q k^T); and the gradients of all inputs.
//
// Keys and values are read once per head, for the words' rows only. The largest scratch memory is a
// row of logits; heads are summed directly into the map. Arithmetic is in float (double for
// double). One thread computes a whole map, so the number of threads does not change the result.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "normalize.h"
#include "simd.h"
#include "word_attention_problem.h"

namespace softmask {
namespace {

using namespace words;

// Scratch memory for one row of one head: converted rows, the softmax, the gradient with respect to
// the attention, and a row of sums.
template <typename acc_t>
struct Scratch {
  acc_t *query, *grad_output, *attention, *gradient, *partial;

  static std::vector<acc_t> memory(int64_t width, int64_t value_width, int64_t patches) {
    return std::vector<acc_t>(width + value_width + 2 * patches + std::max(width, value_width));
  }
  Scratch(std::vector<acc_t>& memory, int64_t width, int64_t value_width, int64_t patches)
      : query(memory.data()),
        grad_output(query + width),
        attention(grad_output + value_width),
        gradient(attention + patches),
        partial(gradient + patches) {}
};

// attention = softmax of the row, gradient = dO (v + bias)^T, 0 where it has no effect. Returns
// false if every key is ignored.
template <int Bytes, typename scalar_t, typename acc_t>
SOFTMASK_INLINE bool load_row(const Problem<scalar_t>& problem, const Scratch<acc_t>& scratch,
                              int64_t b, int64_t h, int64_t token) {
  constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  const int64_t patches = problem.patches;
  acc_t* attention = scratch.attention;
  simd::convert(scratch.query, problem.query.at(b, h, token), problem.width);
  simd::dots<Bytes>(attention, scratch.query, problem.key.at(b, h, 0), problem.key.row, patches,
                    problem.width);
  for (int64_t p = 0; p < patches; ++p) attention[p] *= problem.scale;
  const bool* ignore = problem.ignored_of(b);
  if (ignore != nullptr) {
    int64_t left = 0;
    for (int64_t p = 0; p < patches; ++p) {
      attention[p] = ignore[p] ? kLowest : attention[p];
      left += !ignore[p];
    }
    if (left == 0) return false;
  }
  simd::softmax<Bytes>(attention, patches);
  if (!problem.gradcam) return true;

  acc_t at_bias = 0;
  simd::convert(scratch.grad_output, problem.grad_output.at(b, h, token), problem.value_width);
  if (problem.bias != nullptr) {
    const acc_t* bias = problem.bias + h * problem.value_width;
    simd::dots<Bytes>(&at_bias, scratch.grad_output, bias, 0, 1, problem.value_width);
  }
  const int64_t prefix = problem.prefix;
  for (int64_t p = 0; p < prefix; ++p) scratch.gradient[p] = 0;
  simd::dots<Bytes>(scratch.gradient + prefix, scratch.grad_output, problem.value.at(b, h, prefix),
                    problem.value.row, patches - prefix, problem.value_width);
  for (int64_t p = prefix; p < patches; ++p) scratch.gradient[p] += at_bias;
  if (ignore != nullptr) {
    for (int64_t p = prefix; p < patches; ++p) {
      scratch.gradient[p] = ignore[p] ? acc_t(0) : scratch.gradient[p];
    }
  }
  return true;
}

// Computes the maps of words [first, last) of caption b, before normalization, into maps [words, P
// - prefix].
struct AddMaps {
  template <int Bytes, typename scalar_t, typename acc_t>
  static SOFTMASK_INLINE void run(const Problem<scalar_t>& problem, const Scratch<acc_t>& scratch,
                                  const Kept<acc_t>& kept, int64_t b, int64_t first, int64_t last,
                                  acc_t* maps) {
    const int64_t size = problem.patches - problem.prefix;
    Scratch<acc_t> own = scratch;
    for (int64_t i = 0; i < (last - first) * size; ++i) maps[i] = 0;
    for (int64_t h = 0; h < problem.heads; ++h) {
      for (int64_t row = first * problem.subtokens; row < last * problem.subtokens; ++row) {
        const int64_t token = problem.index[b * problem.rows() + row];
        const int64_t place = ((b * problem.heads + h) * problem.rows() + row) * kept.pitch;
        if (kept.attention != nullptr) own.attention = kept.attention + place;
        if (kept.gradient != nullptr) own.gradient = kept.gradient + place;
        const bool live = token >= 0 && load_row<Bytes>(problem, own, b, h, token);
        kept.blank_from(place, live ? problem.patches : 0);
        if (!live) continue;
        acc_t* map = maps + (row / problem.subtokens - first) * size;
        const acc_t* attention = own.attention + problem.prefix;
        if (problem.gradcam) {
          add_gradcam<Bytes>(map, attention, own.gradient + problem.prefix, size);
        } else {
          for (int64_t p = 0; p < size; ++p) map[p] += attention[p];
        }
      }
    }
    for (int64_t w = first; w < last; ++w) {
      const int64_t rows = problem.heads * std::max<int64_t>(1, problem.subtokens_of(b, w));
      acc_t* map = maps + (w - first) * size;
      for (int64_t p = 0; p < size; ++p) map[p] /= static_cast<acc_t>(rows);
    }
  }

 private:
  // Vectorized, because branches on signs are unpredictable; !(g < 0) lets NaN through.
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void add_gradcam(acc_t* map, const acc_t* attention, const acc_t* gradient,
                                          int64_t size) {
    for (int64_t p = 0; p < size; p += simd::kLanesOf<acc_t, Bytes>) {
      const int64_t left = size - p;
      const auto a = simd::load_some<Bytes>(attention + p, left, acc_t(0));
      const auto g = simd::load_some<Bytes>(gradient + p, left, acc_t(0));
      const auto before = simd::load_some<Bytes>(map + p, left, acc_t(0)), product = a * g;
      simd::store_some(map + p, before + (g < 0 ? simd::Vector<acc_t, Bytes>{} : product), left);
    }
  }
};

// Adds the gradients of caption b; grad [W, P - prefix] is the gradient with respect to its maps
// before normalization.
struct AddGradients {
  template <int Bytes, typename scalar_t, typename acc_t>
  static SOFTMASK_INLINE void run(const Problem<scalar_t>& problem, const Scratch<acc_t>& scratch,
                                  const Kept<const acc_t>& kept, int64_t b, const acc_t* grad,
                                  acc_t* at_logits, const Gradients<acc_t>& to) {
    if (problem.ignores_all(b)) return;
    const int64_t size = problem.patches - problem.prefix;
    const bool* ignore = problem.ignored_of(b);
    for (int64_t h = 0; h < problem.heads; ++h) {
      for (int64_t row = 0; row < problem.rows(); ++row) {
        const int64_t token = problem.index[b * problem.rows() + row];
        if (token < 0) continue;
        const int64_t place = ((b * problem.heads + h) * problem.rows() + row) * kept.pitch;
        const acc_t *attention = kept.attention + place, *gradient = kept.gradient + place;
        simd::convert(scratch.query, problem.query.at(b, h, token), problem.width);
        if (problem.gradcam) {
          simd::convert(scratch.grad_output, problem.grad_output.at(b, h, token),
                        problem.value_width);
        }
        const int64_t w = row / problem.subtokens;
        const acc_t share = 1 / static_cast<acc_t>(problem.heads * problem.subtokens_of(b, w));
        for (int64_t p = 0; p < problem.patches; ++p) {
          const bool shown = p >= problem.prefix && (ignore == nullptr || !ignore[p]);
          const acc_t upstream = shown ? grad[w * size + p - problem.prefix] * share : acc_t(0);
          const acc_t gate = !problem.gradcam ? acc_t(1) : gradient[p] < 0 ? acc_t(0) : gradient[p];
          at_logits[p] = upstream * gate * attention[p];  // A dA
          if (problem.gradcam) {                          // gradient of dO (v + bias)^T
            scratch.gradient[p] = gradient[p] > 0 ? upstream * attention[p] : acc_t(0);
          }
        }
        const acc_t total = simd::sum<Bytes>(at_logits, problem.patches);
        for (int64_t p = 0; p < problem.patches; ++p) {
          at_logits[p] = (at_logits[p] - attention[p] * total) * problem.scale;
          if (ignore != nullptr && ignore[p]) continue;
          simd::add_scaled(to.key.at(b, h, p), scratch.query, at_logits[p], problem.width);
        }
        simd::add_rows(to.query.at(b, h, token), problem.key.at(b, h, 0), problem.key.row,
                       at_logits, ignore, problem.patches, problem.width, scratch.partial);
        if (problem.gradcam) add_values<Bytes>(problem, scratch, b, h, token, to);
      }
    }
  }

  template <int Bytes, typename scalar_t, typename acc_t>
  static SOFTMASK_INLINE void add_values(const Problem<scalar_t>& problem,
                                         const Scratch<acc_t>& scratch, int64_t b, int64_t h,
                                         int64_t token, const Gradients<acc_t>& to) {
    const int64_t width = problem.value_width, prefix = problem.prefix;
    const bool* ignore = problem.ignored_of(b);
    acc_t* row = to.grad_output.at(b, h, token);
    simd::add_rows(row, problem.value.at(b, h, prefix), problem.value.row,
                   scratch.gradient + prefix, ignore == nullptr ? nullptr : ignore + prefix,
                   problem.patches - prefix, width, scratch.partial);
    for (int64_t p = prefix; p < problem.patches; ++p) {
      if (ignore != nullptr && ignore[p]) continue;
      simd::add_scaled(to.value.at(b, h, p), scratch.grad_output, scratch.gradient[p], width);
    }
    if (problem.bias != nullptr) {
      const acc_t factor = simd::sum<Bytes>(scratch.gradient, problem.patches);
      simd::add_scaled(row, problem.bias + h * width, factor, width);
      simd::add_scaled(to.bias + (b * problem.heads + h) * width, scratch.grad_output, factor,
                       width);
    }
  }
};

template <typename scalar_t>
void forward_kernel(const Inputs& inputs, Normalize mode, const at::Tensor& maps,
                    const at::Tensor& raw, const at::Tensor& kept_rows) {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t> problem = inputs.problem<scalar_t>();
  const int64_t size = problem.patches - problem.prefix, words = problem.words;
  acc_t* out = maps.mutable_data_ptr<acc_t>();
  acc_t* unnormalized = raw.numel() > 0 ? raw.mutable_data_ptr<acc_t>() : nullptr;
  const Kept<acc_t> kept = kept_rows.numel() > 0 ? Kept<acc_t>(kept_rows) : Kept<acc_t>();
  at::parallel_for(0, problem.batch * words, 1, [&](int64_t begin, int64_t end) {
    auto memory = Scratch<acc_t>::memory(problem.width, problem.value_width, problem.patches);
    const Scratch<acc_t> scratch(memory, problem.width, problem.value_width, problem.patches);
    for (int64_t at = begin; at < end;) {  // words of one caption at a time: its keys stay cached
      int64_t b = at / words, first = at % words;
      int64_t last = std::min(words, first + end - at);
      acc_t* map = out + at * size;
      simd::run<AddMaps>(problem, scratch, kept, b, first, last, map);
      if (unnormalized != nullptr)
        std::copy_n(map, (last - first) * size, unnormalized + at * size);
      for (int64_t w = first; w < last; ++w, ++at, map += size) {
        if (mode == Normalize::kNone) continue;
        const Normalizer norm(map, size, mode);
        for (int64_t p = 0; p < size; ++p) map[p] = static_cast<acc_t>(norm(map[p]));
      }
    }
  });
}

template <typename scalar_t>
void backward_kernel(const Inputs& inputs, Normalize mode, const at::Tensor& grad,
                     const at::Tensor& raw, const at::Tensor& kept_rows,
                     const std::vector<at::Tensor>& outputs) {
  using acc_t = at::opmath_type<scalar_t>;
  const Problem<scalar_t> problem = inputs.problem<scalar_t>();
  const int64_t size = problem.patches - problem.prefix, words = problem.words;
  const acc_t* upstream = grad.const_data_ptr<acc_t>();
  const acc_t* unnormalized = mode == Normalize::kNone ? nullptr : raw.const_data_ptr<acc_t>();
  const Kept<const acc_t> kept(kept_rows);
  Gradients<acc_t> to{rows_of<acc_t>(outputs[0]), rows_of<acc_t>(outputs[1]), {}, {}, nullptr};
  if (problem.gradcam) {
    to.value = rows_of<acc_t>(outputs[2]);
    to.grad_output = rows_of<acc_t>(outputs[3]);
    to.bias = outputs[4].mutable_data_ptr<acc_t>();
  }
  at::parallel_for(0, problem.batch, 1, [&](int64_t begin, int64_t end) {
    auto memory = Scratch<acc_t>::memory(problem.width, problem.value_width, problem.patches);
    const Scratch<acc_t> scratch(memory, problem.width, problem.value_width, problem.patches);
    std::vector<acc_t> at_map(words * size), at_logits(problem.patches);
    std::vector<double> wide(size);
    for (int64_t b = begin; b < end; ++b) {
      std::copy_n(upstream + b * words * size, words * size, at_map.begin());
      for (int64_t w = 0; w < words && mode != Normalize::kNone; ++w) {
        const acc_t* map = unnormalized + (b * words + w) * size;
        acc_t* g = at_map.data() + w * size;
        std::copy_n(g, size, wide.begin());
        Normalizer(map, size, mode).backward(map, wide.data(), size);
        std::copy_n(wide.begin(), size, g);
      }
      const acc_t* g = at_map.data();
      acc_t* logits = at_logits.data();
      simd::run<AddGradients>(problem, scratch, kept, b, g, logits, to);
    }
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> word_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& word_index,
    const OptionalTensor& value, const OptionalTensor& grad_output,
    const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale,
    int64_t num_prefix_tokens, std::string_view normalize, bool keep) {
  const Normalize mode = parse_normalize(normalize);
  const Inputs inputs(query, key, word_index, value, grad_output, value_bias, key_padding_mask,
                      scale, num_prefix_tokens);
  const auto options = query.options().dtype(inputs.accumulated());
  const int64_t keys = key.size(2), rows = word_index.size(1) * word_index.size(2);
  const at::Tensor maps =
      at::empty({query.size(0), word_index.size(1), keys - num_prefix_tokens}, options);
  const at::Tensor nothing = at::empty({0}, options);
  const at::Tensor raw = keep && mode != Normalize::kNone ? at::empty_like(maps) : nothing;
  const at::Tensor kept = keep ? at::empty({value.has_value() ? 2 : 1, query.size(0), query.size(1),
                                            rows, (keys + 15) / 16 * 16},
                                           options)
                               : nothing;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, inputs.type, "word_attention",
                                  [&] { forward_kernel<scalar_t>(inputs, mode, maps, raw, kept); });
  return {maps, raw, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> word_attention_backward(
    const at::Tensor& grad, const at::Tensor& raw, const at::Tensor& kept, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& word_index, const OptionalTensor& value,
    const OptionalTensor& grad_output, const OptionalTensor& value_bias,
    const OptionalTensor& key_padding_mask, double scale, int64_t num_prefix_tokens,
    std::string_view normalize) {
  const Normalize mode = parse_normalize(normalize);
  const Inputs inputs(query, key, word_index, value, grad_output, value_bias, key_padding_mask,
                      scale, num_prefix_tokens);
  TORCH_CHECK_VALUE(kept.dim() == 5 && (mode == Normalize::kNone || raw.sizes() == grad.sizes()),
                    "raw, kept: expected what word_attention returns with keep=True, got shapes ",
                    raw.sizes(), ", ", kept.sizes());
  const auto options = query.options().dtype(inputs.accumulated());
  const auto zeros_like = [&](const OptionalTensor& tensor) {
    return tensor.has_value() ? at::zeros(tensor->sizes(), options) : at::empty({0}, options);
  };
  const at::Tensor by_caption =
      value_bias.has_value()
          ? at::zeros({query.size(0), query.size(1), value_bias->size(1)}, options)
          : at::empty({0}, options);
  const std::vector<at::Tensor> sums = {zeros_like(query), zeros_like(key), zeros_like(value),
                                        zeros_like(grad_output), by_caption};
  const at::Tensor upstream = grad.to(inputs.accumulated()).contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, inputs.type, "word_attention_backward",
      [&] { backward_kernel<scalar_t>(inputs, mode, upstream, raw, kept, sums); });
  const auto as = [&](const at::Tensor& sum, const OptionalTensor& like) {
    return sum.to(like.value_or(query).scalar_type());
  };
  return {as(sums[0], query), as(sums[1], key), as(sums[2], value), as(sums[3], grad_output),
          as(value_bias.has_value() ? by_caption.sum(0) : by_caption, value_bias)};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("word_attention", &softmask::word_attention);
  m.impl("word_attention_backward", &softmask::word_attention_backward);
}
