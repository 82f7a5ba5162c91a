// Loops compiled for several instruction sets within one binary; the processor decides which run.
//
// Body::run and all it calls must be SOFTMASK_INLINE: then they are compiled once per instruction
// set, inside the functions below, and the compiler vectorizes them for it. No lambdas in there:
// they would not inherit the instruction set.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#define SOFTMASK_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)
#define SOFTMASK_AVX512 \
  __attribute__((       \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#define SOFTMASK_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace softmask::simd {

#if defined(__x86_64__)

enum class Isa { kBase, kAvx2, kAvx512 };

inline Isa detect() {
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBase;
}

template <class Body, class... Args>
SOFTMASK_AVX512 void run_avx512(Args&... arguments) {
  Body::run(arguments...);
}

template <class Body, class... Args>
SOFTMASK_AVX2 void run_avx2(Args&... arguments) {
  Body::run(arguments...);
}

#endif

template <class Body, class... Args>
void run(Args&... arguments) {
#if defined(__x86_64__)
  static const Isa isa = detect();
  if (isa == Isa::kAvx512) return run_avx512<Body>(arguments...);
  if (isa == Isa::kAvx2) return run_avx2<Body>(arguments...);
#endif
  Body::run(arguments...);
}

constexpr int64_t kLanes = 16;  // independent sums of a reduction

// <left, right>, left already in the type of the sum.
template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE acc_t dot(const acc_t* left, const scalar_t* right, int64_t size) {
  acc_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] += left[i + lane] * static_cast<acc_t>(right[i + lane]);
    }
  }
  acc_t tail = 0;
  for (; i < size; ++i) tail += left[i] * static_cast<acc_t>(right[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0] + tail;
}

// to += factor * from
template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE void add_scaled(acc_t* to, const scalar_t* from, acc_t factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * static_cast<acc_t>(from[i]);
}

template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE void convert(acc_t* to, const scalar_t* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<acc_t>(from[i]);
}

template <typename acc_t>
SOFTMASK_INLINE acc_t sum(const acc_t* values, int64_t size) {
  acc_t lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  acc_t total = 0;
  for (; i < size; ++i) total += values[i];
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// Largest value; -inf where there is none. A NaN may be lost: exp carries it on.
template <typename acc_t>
SOFTMASK_INLINE acc_t max(const acc_t* values, int64_t size) {
  constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  acc_t lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = kLowest;
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
    }
  }
  acc_t highest = kLowest;
  for (; i < size; ++i) highest = values[i] > highest ? values[i] : highest;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    highest = lanes[lane] > highest ? lanes[lane] : highest;
  }
  return highest;
}

// e^x for x <= 0, to about one rounding: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Below the
// smallest normal number it is 0; a NaN stays.
SOFTMASK_INLINE float exp_nonpositive(float x) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kSmallest = -87.3365f;
  const float bounded = x < kSmallest ? kSmallest : x;
  const float shifted = bounded * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000u + 127u) << 23;  // the integer in the low bits of shifted, as 2^n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < kSmallest ? 0.0f : p * power;
}

SOFTMASK_INLINE double exp_nonpositive(double x) { return __builtin_exp(x); }

}  // namespace softmask::simd
