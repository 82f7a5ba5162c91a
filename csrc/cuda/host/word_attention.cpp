#include "../word_attention.h"

#include "interface.h"

using namespace softmask::cuda;

SOFTMASK_EXPORT const char* word_attention(const WordAttention* problem) {
  return host::error_of([=] { launch_word_attention(*problem, {}); });
}
SOFTMASK_EXPORT const char* word_attention_backward(const WordAttention* problem) {
  return host::error_of([=] { launch_word_attention_backward(*problem, {}); });
}
