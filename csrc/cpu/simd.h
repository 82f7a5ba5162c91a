// Loops compiled for several instruction sets in one binary; which one runs is decided at run time.
//
// Body::run<Bytes> and everything it calls must be SOFTMASK_INLINE. Then it is compiled once per
// instruction set, inside the functions below, with vectors of Bytes bytes. Lambdas cannot be used
// there, because they do not inherit the instruction set.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "vector.h"

#if defined(__x86_64__)
#define SOFTMASK_AVX512 \
  __attribute__((       \
      target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")))
#define SOFTMASK_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif

namespace softmask::simd {

#if defined(__x86_64__)

enum class Isa { kBase, kAvx2, kAvx512 };

// The processor's best instruction set, or a lower one if ATEN_CPU_CAPABILITY limits it, as for
// torch's kernels.
inline Isa detect() {
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view limit = wanted == nullptr ? "" : wanted;
  if (limit == "default") return Isa::kBase;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return avx512 && limit != "avx2" ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kBase;
}

inline Isa isa() {
  static const Isa best = detect();
  return best;
}

template <class Body, class... Args>
SOFTMASK_AVX512 void run_avx512(Args&&... arguments) {
  Body::template run<64>(arguments...);
}

template <class Body, class... Args>
SOFTMASK_AVX2 void run_avx2(Args&&... arguments) {
  Body::template run<32>(arguments...);
}

#endif

template <class Body, class... Args>
void run(Args&&... arguments) {
#if defined(__x86_64__)
  if (isa() == Isa::kAvx512) return run_avx512<Body>(arguments...);
  if (isa() == Isa::kAvx2) return run_avx2<Body>(arguments...);
#endif
  Body::template run<16>(arguments...);
}

inline int vector_bytes() {
#if defined(__x86_64__)
  if (isa() != Isa::kBase) return isa() == Isa::kAvx512 ? 64 : 32;
#endif
  return 16;
}

template <typename T>
constexpr T kLowest = -std::numeric_limits<T>::infinity();

// to[i] = <left, row i of right> for i < count, with rows `stride` apart and sums in acc_t. Rows
// are read one after the other: reading memory at several places at once is slower.
template <int Bytes, typename acc_t, typename scalar_t, typename Side>
SOFTMASK_INLINE void dots_of(acc_t* to, const Side& left, const scalar_t* right, int64_t stride,
                             int64_t count) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Vector<acc_t, Bytes> sums[kLanes];
    for (int k = 0; k < kLanes; ++k) sums[k] = left.products(right + (i + k) * stride);
    store(to + i, sums_of_lanes<kLanes>(sums));
  }
  for (; i < count; ++i) to[i] = sum_lanes(left.products(right + i * stride));
}

template <int Bytes, typename acc_t, typename scalar_t>
SOFTMASK_INLINE void dots(acc_t* to, const acc_t* left, const scalar_t* right, int64_t stride,
                          int64_t count, int64_t size) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  if (size == 8 * kLanes) {
    dots_of<Bytes>(to, LeftInRegisters<acc_t, Bytes, 8>(left), right, stride, count);
  } else if (size == 4 * kLanes) {
    dots_of<Bytes>(to, LeftInRegisters<acc_t, Bytes, 4>(left), right, stride, count);
  } else {
    dots_of<Bytes>(to, Left<acc_t, Bytes>{left, size}, right, stride, count);
  }
}

// to += factor * from
template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE void add_scaled(acc_t* to, const scalar_t* from, acc_t factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * static_cast<acc_t>(from[i]);
}

// to += the sum of factors[i] * row i, a few rows at a time, because long sums in one variable lose
// precision. Rows marked in `skip`, if given, may hold anything.
template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE void add_rows(acc_t* to, const scalar_t* rows, int64_t stride, const acc_t* factors,
                              const bool* skip, int64_t count, int64_t size, acc_t* partial) {
  constexpr int64_t kRows = 32;
  for (int64_t first = 0; first < count; first += kRows) {
    for (int64_t e = 0; e < size; ++e) partial[e] = 0;
    for (int64_t i = first; i < count && i < first + kRows; ++i) {
      if (skip != nullptr && skip[i]) continue;
      add_scaled(partial, rows + i * stride, factors[i], size);
    }
    for (int64_t e = 0; e < size; ++e) to[e] += partial[e];
  }
}

template <typename acc_t, typename scalar_t>
SOFTMASK_INLINE void convert(acc_t* to, const scalar_t* from, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<acc_t>(from[i]);
}

template <int Bytes, typename acc_t>
SOFTMASK_INLINE acc_t sum(const acc_t* values, int64_t size) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  Vector<acc_t, Bytes> total{};
  for (int64_t first = 0; first < size; first += kTogether * kLanes) {
    Vector<acc_t, Bytes> sums{};
    for (int64_t i = first; i < size && i < first + kTogether * kLanes; i += kLanes) {
      sums += load_some<Bytes>(values + i, size - i, acc_t(0));
    }
    total += sums;
  }
  return sum_lanes(total);
}

// Largest value; -inf if there are none. A NaN may be lost here, but exp propagates it.
template <int Bytes, typename acc_t>
SOFTMASK_INLINE acc_t max(const acc_t* values, int64_t size) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  Vector<acc_t, Bytes> highest = splat<Bytes>(kLowest<acc_t>);
  for (int64_t i = 0; i < size; i += kLanes) {
    const auto next = load_some<Bytes>(values + i, size - i, kLowest<acc_t>);
    highest = next > highest ? next : highest;
  }
  return max_lanes(highest);
}

// e^x for x <= 0, to about one rounding: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Results
// below the smallest normal number are 0; NaN stays NaN.
template <typename V>
SOFTMASK_INLINE V exp_nonpositive(const V& x) {
  if constexpr (std::is_same_v<std::decay_t<decltype(x[0])>, double>) {
    V y;
    for (int i = 0; i < static_cast<int>(sizeof(V) / sizeof(double)); ++i) {
      y[i] = __builtin_exp(x[i]);
    }
    return y;
  } else {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    constexpr float kSmallest = -87.3365f;
    const V lowest = V{} + kSmallest;
    const V bounded = x < lowest ? lowest : x;
    const V shifted = bounded * 1.44269504f + kShift;
    const V n = shifted - kShift;
    const V r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
    V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // 2^n from the integer in the low bits of `shifted`
    const auto bits = (as<Vector<uint32_t, sizeof(V)>>(shifted) - (0x4B400000u - 127u)) << 23;
    return x < lowest ? V{} : p * as<V>(bits);
  }
}

// values = e^(values - highest); returns their sum.
template <int Bytes, typename acc_t>
SOFTMASK_INLINE acc_t exponentials(acc_t* values, acc_t highest, int64_t size) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  Vector<acc_t, Bytes> sums{};
  for (int64_t i = 0; i < size; i += kLanes) {
    const auto y =
        exp_nonpositive(load_some<Bytes>(values + i, size - i, kLowest<acc_t>) - highest);
    store_some(values + i, y, size - i);
    sums += y;
  }
  return sum_lanes(sums);
}

template <int Bytes, typename acc_t>
SOFTMASK_INLINE void softmax(acc_t* values, int64_t size) {
  const acc_t inverse = 1 / exponentials<Bytes>(values, max<Bytes>(values, size), size);
  for (int64_t i = 0; i < size; ++i) values[i] *= inverse;
}

// The log of a sum of exponentials as highest + rest. A single number would be rounded at the
// magnitude of the largest logit, and so would every probability.
template <typename acc_t>
struct LogSum {
  acc_t highest, rest;

  double log_probability(acc_t logit) const { return double(logit) - highest - rest; }
};

template <int Bytes, typename acc_t>
SOFTMASK_INLINE LogSum<acc_t> log_sum_exp(const acc_t* values, int64_t size) {
  constexpr int kLanes = kLanesOf<acc_t, Bytes>;
  const acc_t highest = max<Bytes>(values, size);
  Vector<acc_t, Bytes> sums{};
  for (int64_t i = 0; i < size; i += kLanes) {
    sums += exp_nonpositive(load_some<Bytes>(values + i, size - i, kLowest<acc_t>) - highest);
  }
  return {highest, std::log(sum_lanes(sums))};
}

// to = factor * from, computed in the factor's type.
struct ScaleRow {
  template <int Bytes, typename from_t, typename acc_t, typename to_t>
  static SOFTMASK_INLINE void run(const from_t* from, acc_t factor, to_t* to, int64_t size) {
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<to_t>(factor * acc_t(from[i]));
  }
};

}  // namespace softmask::simd
