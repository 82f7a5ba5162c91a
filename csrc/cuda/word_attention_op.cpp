// softmask::cuda_word_attention and its gradient: tensors checked, laid out and handed to the
// kernels.

#include <tuple>

#include "tensors.h"
#include "word_attention.h"

namespace softmask::cuda {
namespace {

// The arguments in the types and layouts that the kernels read; they live as long as the launches
// need them.
struct Inputs {
  at::Tensor query, key, index, value, grad_output, bias, ignored;
  WordAttention problem{};

  Inputs(const at::Tensor& query, const at::Tensor& key, const at::Tensor& word_index,
         const OptionalTensor& value, const OptionalTensor& grad_output,
         const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale,
         int64_t prefix, std::string_view normalize)
      : index(word_index.contiguous()) {
    TORCH_CHECK_VALUE(
        query.dim() == 4 && key.dim() == 4 && word_index.dim() == 3,
        "query, key, word_index: expected [B, H, T, E], [B, H, P, E], [B, W, S], got ",
        query.sizes(), ", ", key.sizes(), ", ", word_index.sizes());
    TORCH_CHECK_VALUE(value.has_value() == grad_output.has_value(),
                      "value, grad_output: expected both or neither");
    TORCH_CHECK_VALUE(prefix >= 0 && prefix < key.size(2), "num_prefix_tokens: expected less than ",
                      key.size(2), " keys, got ", prefix);
    const at::ScalarType type = common_type({query, key, value, grad_output});
    this->query = dense_rows(query.to(type)), this->key = dense_rows(key.to(type));
    problem.query = rows_of(this->query), problem.key = rows_of(this->key);
    if (value.has_value()) {
      this->value = dense_rows(value->to(type));
      this->grad_output = dense_rows(grad_output->to(type));
      problem.value = rows_of(this->value), problem.grad_output = rows_of(this->grad_output);
      problem.value_width = value->size(3);
    }
    if (value_bias.has_value()) {
      bias = value_bias->to(at::kFloat).contiguous();
      problem.bias = bias.const_data_ptr<float>();
    }
    if (key_padding_mask.has_value()) {
      ignored = dense_rows(*key_padding_mask);
      problem.ignored = ignored.const_data_ptr<bool>();
      problem.ignored_caption = ignored.stride(0);
    }
    problem.captions = query.size(0), problem.heads = query.size(1);
    problem.tokens = query.size(2), problem.width = query.size(3), problem.keys = key.size(2);
    problem.words = index.size(1), problem.subtokens = index.size(2);
    problem.prefix = prefix, problem.pitch = (problem.keys + 15) / 16 * 16;
    problem.type = type_of(type), problem.normalize = normalize_of(normalize);
    problem.scale = static_cast<float>(scale);
    problem.index = index.const_data_ptr<int64_t>();
  }

  // Without words there is nothing to launch, and results are zeros.
  bool is_empty() const { return index.numel() == 0; }

  at::Tensor floats(at::IntArrayRef sizes) const {
    const auto options = query.options().dtype(at::kFloat);
    return is_empty() ? at::zeros(sizes, options) : at::empty(sizes, options);
  }
  at::Tensor rows(int64_t sides, int64_t width) const {
    const int64_t number = problem.words * problem.subtokens;
    return floats({sides, problem.captions, problem.heads, number, width});
  }
  at::Tensor of_maps() const {
    return floats({problem.captions, problem.words, problem.keys - problem.prefix});
  }

  // rows_kept: [1 or 2, B, H, R, pitch], the attention and, with values, the gates.
  void set_rows(const at::Tensor& rows_kept) {
    problem.attention = rows_kept.mutable_data_ptr<float>();
    if (value.defined()) problem.gates = problem.attention + rows_kept.numel() / 2;
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> word_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& word_index,
    const OptionalTensor& value, const OptionalTensor& grad_output,
    const OptionalTensor& value_bias, const OptionalTensor& key_padding_mask, double scale,
    int64_t num_prefix_tokens, std::string_view normalize, bool keep) {
  const OnDevice on_device(query);
  Inputs inputs(query, key, word_index, value, grad_output, value_bias, key_padding_mask, scale,
                num_prefix_tokens, normalize);
  WordAttention& problem = inputs.problem;
  const at::Tensor maps = inputs.of_maps(), nothing = inputs.floats({0});
  const at::Tensor raw = keep && problem.normalize != Normalize::kNone ? inputs.of_maps() : nothing;
  const at::Tensor rows = inputs.rows(value.has_value() ? 2 : 1, problem.pitch);
  if (!inputs.is_empty()) {
    inputs.set_rows(rows);
    problem.keep = keep, problem.maps = maps.mutable_data_ptr<float>();
    problem.raw = raw.numel() > 0 ? raw.mutable_data_ptr<float>() : nullptr;
    launch_word_attention(problem, on_device.stream());
    on_device.check();
  }
  return {maps, raw, keep ? rows : nothing};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> word_attention_backward(
    const at::Tensor& grad, const at::Tensor& raw, const at::Tensor& kept, const at::Tensor& query,
    const at::Tensor& key, const at::Tensor& word_index, const OptionalTensor& value,
    const OptionalTensor& grad_output, const OptionalTensor& value_bias,
    const OptionalTensor& key_padding_mask, double scale, int64_t num_prefix_tokens,
    std::string_view normalize) {
  const OnDevice on_device(query);
  Inputs inputs(query, key, word_index, value, grad_output, value_bias, key_padding_mask, scale,
                num_prefix_tokens, normalize);
  WordAttention& problem = inputs.problem;
  TORCH_CHECK_VALUE(
      kept.dim() == 5 && (problem.normalize == Normalize::kNone || raw.sizes() == grad.sizes()),
      "raw, kept: expected what cuda_word_attention returns with keep=True, got shapes ",
      raw.sizes(), ", ", kept.sizes());
  const auto like = [&](const OptionalTensor& tensor, at::ScalarType type) {
    const at::DimVector sizes =
        tensor.has_value() ? at::DimVector(tensor->sizes()) : at::DimVector{0};
    const auto options = query.options().dtype(type);
    return inputs.is_empty() ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  const at::ScalarType type = inputs.query.scalar_type();
  const at::Tensor d_query = like(query, type), d_key = like(key, type);
  const at::Tensor d_value = like(value, type), d_grad_output = like(grad_output, type);
  const at::Tensor d_bias = like(value_bias, at::kFloat);
  if (!inputs.is_empty()) {
    const int64_t sides = value.has_value() ? 2 : 1;
    const at::Tensor d_maps = grad.contiguous(), d_raw = inputs.of_maps();
    const at::Tensor d_rows = inputs.rows(sides, problem.pitch), sums = inputs.rows(1, 1);
    const at::Tensor query_parts = inputs.rows(1, problem.width);
    const at::Tensor grad_output_parts = inputs.rows(1, problem.value_width);
    inputs.set_rows(kept);
    problem.raw = raw.numel() > 0 ? raw.mutable_data_ptr<float>() : nullptr;
    problem.d_maps = d_maps.const_data_ptr<float>(),
    problem.d_raw = d_raw.mutable_data_ptr<float>();
    problem.d_logits = d_rows.mutable_data_ptr<float>();
    problem.query_parts = query_parts.mutable_data_ptr<float>();
    problem.d_query = d_query.mutable_data_ptr(), problem.d_key = d_key.mutable_data_ptr();
    if (value.has_value()) {
      problem.d_gates = problem.d_logits + d_rows.numel() / 2;
      problem.d_gate_sums = sums.mutable_data_ptr<float>();
      problem.grad_output_parts = grad_output_parts.mutable_data_ptr<float>();
      problem.d_value = d_value.mutable_data_ptr();
      problem.d_grad_output = d_grad_output.mutable_data_ptr();
    }
    if (value_bias.has_value()) problem.d_bias = d_bias.mutable_data_ptr<float>();
    launch_word_attention_backward(problem, on_device.stream());
    on_device.check();
  }
  const auto as = [&](const at::Tensor& gradient, const OptionalTensor& tensor) {
    return gradient.to(tensor.value_or(query).scalar_type());
  };
  return {as(d_query, query), as(d_key, key), as(d_value, value), as(d_grad_output, grad_output),
          as(d_bias, value_bias)};
}

}  // namespace
}  // namespace softmask::cuda

TORCH_LIBRARY_IMPL(softmask, SOFTMASK_DISPATCH, m) {
  m.impl("cuda_word_attention", &softmask::cuda::word_attention);
  m.impl("cuda_word_attention_backward", &softmask::cuda::word_attention_backward);
}
