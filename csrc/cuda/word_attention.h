// Rows of the attention, or of Grad-CAM, at the tokens of words, and their gradients: what the
// kernels take.

#pragma once

#include "types.h"

namespace softmask::cuda {

// Without values, what belongs to values is null.
struct WordAttention {
  int64_t captions;     // B
  int64_t heads;        // H
  int64_t tokens;       // T
  int64_t keys;         // P
  int64_t width;        // E
  int64_t value_width;  // V
  int64_t words;        // W
  int64_t subtokens;    // S; the words' rows are R = W S
  int64_t prefix;       // leading keys that the maps leave out; P' = P - prefix
  int64_t pitch;        // P rounded up to a multiple of 16
  Type type;            // of the rows and their gradients
  Normalize normalize;
  float scale;
  bool keep;             // whether the gradient needs attention and gates
  Rows query;            // [B, H, T, E]
  Rows key;              // [B, H, P, E]
  Rows value;            // [B, H, P, V]
  Rows grad_output;      // [B, H, T, V]
  const int64_t* index;  // [B, W, S], negative for none
  const float* bias;     // [H, V] or null
  const bool* ignored;   // [B, P] or null
  int64_t ignored_caption;
  float* attention;  // [B, H, R, pitch]: logits between the forward launches
  float* gates;      // [B, H, R, pitch]: relu(grad_output (value + bias)^T)
  float* maps;       // [B, W, P']
  float* raw;        // [B, W, P'], the maps before normalization, or null

  // Of the backward pass, which takes attention, gates and raw as the forward pass kept them.
  const float* d_maps;       // [B, W, P']
  float* d_raw;              // [B, W, P'], with respect to each of the rows that a map averages
  float* d_logits;           // [B, H, R, pitch], with respect to query key^T
  float* d_gates;            // [B, H, R, pitch], with respect to grad_output (value + bias)^T
  float* d_gate_sums;        // [B, H, R], over keys
  float* query_parts;        // [B, H, R, E], gradients of rows
  float* grad_output_parts;  // [B, H, R, V]
  void* d_query;             // [B, H, T, E]
  void* d_key;               // [B, H, P, E]
  void* d_value;             // [B, H, P, V]
  void* d_grad_output;       // [B, H, T, V]
  float* d_bias;             // [H, V] or null
};

void launch_word_attention(const WordAttention& problem, Stream stream);
void launch_word_attention_backward(const WordAttention& problem, Stream stream);

// Whether all rows can be read in packs of 16 bytes.
bool is_wide(const WordAttention& problem);

}  // namespace softmask::cuda
