// Vectors of a fixed number of bytes, which the compiler splits if the processor's are shorter.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define SOFTMASK_INLINE inline __attribute__((always_inline))

// Unrolls small loops over registers.
#if defined(__clang__)
#define SOFTMASK_UNROLL _Pragma("unroll")
#else
#define SOFTMASK_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace softmask::simd {

template <typename T, int Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T, int Bytes>
using Vector = typename VectorOf<T, Bytes>::type;

template <typename T, int Bytes>
constexpr int kLanesOf = Bytes / static_cast<int>(sizeof(T));

template <typename To, typename From>
SOFTMASK_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <int Bytes, typename T>
SOFTMASK_INLINE Vector<T, Bytes> splat(T value) {
  return Vector<T, Bytes>{} + value;
}

// Loads consecutive scalar_t into as many acc_t lanes.
template <int Bytes, typename acc_t, typename scalar_t>
SOFTMASK_INLINE Vector<acc_t, Bytes> load(const scalar_t* from) {
  if constexpr (std::is_same_v<acc_t, scalar_t>) {
    Vector<acc_t, Bytes> to;
    std::memcpy(&to, from, sizeof to);
    return to;
  } else {
    static_assert(std::is_same_v<acc_t, float> && sizeof(scalar_t) == 2);
    Vector<uint16_t, Bytes / 2> narrow;
    std::memcpy(&narrow, from, sizeof narrow);
    const auto bits = __builtin_convertvector(narrow, Vector<uint32_t, Bytes>);
    if constexpr (std::is_same_v<scalar_t, c10::BFloat16>) {
      return as<Vector<float, Bytes>>(bits << 16);
    } else {  // half: a product rebases the exponent, and handles subnormals too
      const auto sign = (bits & 0x8000u) << 16;
      const auto rest = (bits & 0x7FFFu) << 13;
      const auto magnitude = as<Vector<uint32_t, Bytes>>(as<Vector<float, Bytes>>(rest) * 0x1p112f);
      const auto special = rest >= 0x0F800000u ? splat<Bytes>(0x7F800000u) : splat<Bytes>(0u);
      return as<Vector<float, Bytes>>(sign | magnitude | special);
    }
  }
}

template <typename T, typename V>
SOFTMASK_INLINE void store(T* to, const V& from) {
  static_assert(std::is_same_v<std::decay_t<decltype(from[0])>, T>);
  std::memcpy(to, &from, sizeof from);
}

// Loads the first `count` lanes; any further lanes are `fill`.
template <int Bytes, typename T>
SOFTMASK_INLINE Vector<T, Bytes> load_some(const T* from, int64_t count, T fill) {
  if (count >= kLanesOf<T, Bytes>) return load<Bytes, T>(from);
  Vector<T, Bytes> to = splat<Bytes>(fill);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
  return to;
}

template <typename T, typename V>
SOFTMASK_INLINE void store_some(T* to, const V& from, int64_t count) {
  if (count >= kLanesOf<T, sizeof(V)>) return store(to, from);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
}

// Sets the lanes after the first `count` to zero.
template <typename V>
SOFTMASK_INLINE V first_lanes(const V& vector, int64_t count) {
  V some{};
  for (int64_t i = 0; i < count; ++i) some[i] = vector[i];
  return some;
}

template <typename V>
SOFTMASK_INLINE auto sum_lanes(const V& vector) {
  auto total = vector[0];
  for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(vector[0])); ++i) total += vector[i];
  return total;
}

template <typename V>
SOFTMASK_INLINE auto max_lanes(const V& vector) {
  auto highest = vector[0];
  for (int i = 1; i < static_cast<int>(sizeof(V) / sizeof(vector[0])); ++i) {
    highest = vector[i] > highest ? vector[i] : highest;
  }
  return highest;
}

// Selects lanes `index...` of a followed by b.
template <int... index, typename V>
SOFTMASK_INLINE V shuffle(const V& a, const V& b, std::integer_sequence<int, index...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, index...);
#else
  using Lane = std::decay_t<decltype(a[0])>;
  using Index = Vector<std::conditional_t<sizeof(Lane) == 4, int32_t, int64_t>, sizeof(V)>;
  return __builtin_shuffle(a, b, Index{index...});
#endif
}

// Half of the lanes of a followed by b: the first or the second half of each row's 2 * kLanes /
// rows sums.
template <int rows, int second, typename V, int... lane>
SOFTMASK_INLINE V half_of_rows(const V& a, const V& b, std::integer_sequence<int, lane...>) {
  constexpr int kSums = static_cast<int>(sizeof...(lane)) / rows;
  return shuffle(
      a, b,
      std::integer_sequence<int, lane / kSums * 2 * kSums + lane % kSums + second * kSums...>{});
}

// Lane j of row i becomes lane i of row j: each step swaps blocks of `size` lanes between rows
// `size` apart.
template <int size, typename V, int lanes, int... lane>
SOFTMASK_INLINE void transpose(V (&rows)[lanes], std::integer_sequence<int, lane...> all) {
  for (int i = 0; i < lanes; ++i) {
    if (i & size) continue;
    const V a = rows[i], b = rows[i + size];
    rows[i] =
        shuffle(a, b, std::integer_sequence<int, (lane & size ? lanes + lane - size : lane)...>{});
    rows[i + size] =
        shuffle(a, b, std::integer_sequence<int, (lane & size ? lanes + lane : lane + size)...>{});
  }
  if constexpr (2 * size < lanes) transpose<2 * size>(rows, all);
}

constexpr int64_t kTogether = 16;  // terms of a partial sum

// Products of left with a row of any size, summed to kLanes partial sums.
template <typename acc_t, int Bytes>
struct Left {
  static constexpr int kLanes = kLanesOf<acc_t, Bytes>;

  const acc_t* left;
  int64_t size;

  template <typename scalar_t>
  SOFTMASK_INLINE Vector<acc_t, Bytes> products(const scalar_t* right) const {
    Vector<acc_t, Bytes> total{};
    int64_t i = 0;
    while (i + kLanes <= size) {  // few terms per sum: long sums in one variable lose precision
      Vector<acc_t, Bytes> sums{};
      for (int64_t end = i + kTogether * kLanes; i < end && i + kLanes <= size; i += kLanes) {
        sums += load<Bytes, acc_t>(left + i) * load<Bytes, acc_t>(right + i);
      }
      total += sums;
    }
    for (; i < size; ++i) total[0] += left[i] * static_cast<acc_t>(right[i]);
    return total;
  }
};

// The same with the left side in registers: attention heads are only a few vectors wide.
template <typename acc_t, int Bytes, int vectors>
struct LeftInRegisters {
  static constexpr int kLanes = kLanesOf<acc_t, Bytes>;

  Vector<acc_t, Bytes> of[vectors];

  SOFTMASK_INLINE explicit LeftInRegisters(const acc_t* left) {
    for (int i = 0; i < vectors; ++i) of[i] = load<Bytes, acc_t>(left + i * kLanes);
  }
  template <typename scalar_t>
  SOFTMASK_INLINE Vector<acc_t, Bytes> products(const scalar_t* right) const {
    Vector<acc_t, Bytes> sums = of[0] * load<Bytes, acc_t>(right);
    SOFTMASK_UNROLL
    for (int i = 1; i < vectors; ++i) sums += of[i] * load<Bytes, acc_t>(right + i * kLanes);
    return sums;
  }
};

// Sums the lanes of each of `rows` vectors, to kLanes / rows partial sums each.
template <int rows, typename V>
SOFTMASK_INLINE V sums_of_lanes(const V* vectors) {
  if constexpr (rows == 1) {
    return vectors[0];
  } else {
    const V a = sums_of_lanes<rows / 2>(vectors), b = sums_of_lanes<rows / 2>(vectors + rows / 2);
    constexpr int kLanes = static_cast<int>(sizeof(V) / sizeof(a[0]));
    constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
    return half_of_rows<rows, 0>(a, b, kAll) + half_of_rows<rows, 1>(a, b, kAll);
  }
}

}  // namespace softmask::simd
