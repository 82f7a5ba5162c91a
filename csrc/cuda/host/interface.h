// A C interface to kernels on the host, for tests: functions return the text of an error, or null.

#pragma once

#include <exception>
#include <string>

#include "../device.h"

namespace softmask::cuda::host {

template <typename Run>
const char* error_of(const Run& run) {
  static std::string text;
  try {
    run();
  } catch (const std::exception& error) {
    text = error.what();
    return text.c_str();
  }
  return nullptr;
}

}  // namespace softmask::cuda::host

#define SOFTMASK_EXPORT extern "C" __attribute__((visibility("default")))

SOFTMASK_EXPORT void set_order(int order) {
  softmask::cuda::host::order = static_cast<softmask::cuda::host::Order>(order);
}
