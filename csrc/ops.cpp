// Schemas of the C++ operators. Importing the extension registers them and the kernels beside.

#include <Python.h>
#include <torch/library.h>

TORCH_LIBRARY(softmask, m) {
  // normalize: "none", "minmax", "max" or "sum". features [B, P, D], maps [B, P'] or [B, W, P'].
  m.def(
      "soft_mask(Tensor features, Tensor maps, float strength, str normalize, "
      "int num_prefix_tokens) -> Tensor");
  // Gradients of features and maps. An empty tensor stands for one that is not wanted: features'
  // where features_grad is false, maps' where no features are given.
  m.def(
      "soft_mask_backward(Tensor grad, Tensor? features, Tensor maps, float strength, "
      "str normalize, int num_prefix_tokens, bool features_grad) -> (Tensor, Tensor)");
  // query, grad_output [B, H, T, E], key, value [B, H, P, E], word_index [B, W, S], value_bias
  // [H, E], key_padding_mask [B, P]. Floating tensors share a type.
  m.def(
      "word_attention(Tensor query, Tensor key, Tensor word_index, Tensor? value, "
      "Tensor? grad_output, Tensor? value_bias, Tensor? key_padding_mask, float scale, "
      "int num_prefix_tokens, str normalize) -> Tensor");
  // Gradients of query, key, value, grad_output and value_bias; empty for those not given.
  m.def(
      "word_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor word_index, "
      "Tensor? value, Tensor? grad_output, Tensor? value_bias, Tensor? key_padding_mask, "
      "float scale, int num_prefix_tokens, str normalize) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// torch.ops is the interface; Python only needs something to import.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
