#include "../soft_mask.h"

#include "interface.h"

using namespace softmask::cuda;

SOFTMASK_EXPORT const char* soft_mask(const SoftMask* problem) {
  return host::error_of([=] { launch_soft_mask(*problem, {}); });
}
SOFTMASK_EXPORT const char* soft_mask_backward(const SoftMask* problem) {
  return host::error_of([=] { launch_soft_mask_backward(*problem, {}); });
}
