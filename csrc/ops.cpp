// Schemas of the C++ operators. Importing the extension registers them and the kernels.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(softmask, m) {
  // normalize: "none", "minmax", "max" or "sum". features [B, P, D], maps [B, P'] or [B, W, P'].
  m.def(
      "soft_mask(Tensor features, Tensor maps, float strength, str normalize, "
      "SymInt num_prefix_tokens) -> Tensor");
  // Gradients of features and maps. A gradient that is not requested is an empty tensor: features'
  // if features_grad is false, maps' if no features are given.
  m.def(
      "soft_mask_backward(Tensor grad, Tensor? features, Tensor maps, float strength, "
      "str normalize, SymInt num_prefix_tokens, bool features_grad) -> (Tensor, Tensor)");
  // query, grad_output [B, H, T, E], key, value [B, H, P, E], word_index [B, W, S], value_bias [H,
  // E], key_padding_mask [B, P]. Returns the maps and, with keep, what the backward pass needs: the
  // maps before normalization (empty for "none") and the words' rows, [1 or 2, B, H, W S, P rounded
  // up to a multiple of 16]. Without keep, both are empty.
  m.def(
      "word_attention(Tensor query, Tensor key, Tensor word_index, Tensor? value, "
      "Tensor? grad_output, Tensor? value_bias, Tensor? key_padding_mask, float scale, "
      "SymInt num_prefix_tokens, str normalize, bool keep) -> (Tensor, Tensor, Tensor)");
  // Gradients of query, key, value, grad_output and value_bias; empty for inputs that are not
  // given.
  m.def(
      "word_attention_backward(Tensor grad, Tensor raw, Tensor kept, Tensor query, Tensor key, "
      "Tensor word_index, "
      "Tensor? value, Tensor? grad_output, Tensor? value_bias, Tensor? key_padding_mask, "
      "float scale, SymInt num_prefix_tokens, str normalize) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // rows [B, D], columns [G, D]. Returns the loss [B] of the rows or, with `both`, of rows and
  // columns (G = B, the same samples), and statistics for the backward pass, [3 or 6, B], with one
  // more row if there are ids.
  m.def(
      "contrastive(Tensor rows, Tensor columns, Tensor scale, Tensor gamma, Tensor? row_ids, "
      "Tensor? column_ids, SymInt first_row, bool both) -> (Tensor, Tensor)");
  m.def(
      "contrastive_backward(Tensor grad, Tensor statistics, Tensor rows, Tensor columns, "
      "Tensor scale, Tensor gamma, Tensor? row_ids, Tensor? column_ids, SymInt first_row, bool "
      "both) "
      "-> (Tensor, Tensor, Tensor)");
  // image, text and their teachers [B, D], keys [G, D], queues [K, D]. Returns the loss [B]; a row
  // [B], which each backend uses in its own way, for the gradient of the scale; and, with gradient,
  // the gradients with respect to scale * image and scale * text, [B, D] each. Without gradient,
  // the last two are empty.
  m.def(
      "momentum_contrastive(Tensor image, Tensor text, Tensor image_teacher, Tensor text_teacher, "
      "Tensor image_keys, Tensor text_keys, Tensor? image_queue, Tensor? text_queue, "
      "Tensor scale, Tensor alpha, Tensor gamma, Tensor? ids, Tensor? key_ids, Tensor? queue_ids, "
      "SymInt first_row, bool gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "momentum_contrastive_backward(Tensor grad, Tensor image, Tensor text, Tensor scale, "
      "Tensor at_scale, Tensor image_gradients, Tensor text_gradients) "
      "-> (Tensor, Tensor, Tensor)");
  // query [N, H, T, E], key, value [B, H, P, E], key_weight [N, P], kv_index [N], value_bias [H,
  // V], key_padding_mask [B, P]. In memory, results have tokens before heads.
  m.def(
      "soft_mask_attention(Tensor query, Tensor key, Tensor value, Tensor? key_weight, "
      "Tensor? kv_index, Tensor? value_bias, Tensor? key_padding_mask, float scale) -> Tensor");
  m.def(
      "soft_mask_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor? key_weight, Tensor? kv_index, Tensor? value_bias, Tensor? key_padding_mask, "
      "float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  // patches [B, P, D], tokens [B, T, D]; selects `count` patches of each image.
  m.def(
      "attentive_mask(Tensor patches, Tensor tokens, Tensor? token_padding_mask, SymInt count, "
      "bool high) -> Tensor");
  // prediction [B, P, 3 * patch_size ** 2], images [B, 3, H, W], mask [B, P]; loss [B, P].
  m.def(
      "masked_patch_loss(Tensor prediction, Tensor images, Tensor mask, SymInt patch_size, "
      "bool normalize) -> Tensor");
  m.def(
      "masked_patch_loss_backward(Tensor grad, Tensor prediction, Tensor images, Tensor mask, "
      "SymInt patch_size, bool normalize) -> Tensor");
}

// torch.ops is the interface; this module only has to be importable.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
