// Elements of tensors in memory, fp32, fp16 and bf16, and loads and stores of up to 16 bytes.

#pragma once

#include "device.h"

namespace softmask::cuda {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float value) { return value; }

#ifndef SOFTMASK_ON_HOST

__device__ __forceinline__ float to_float(Half value) {
  return __half2float(__ushort_as_half(value.bits));
}
__device__ __forceinline__ float to_float(BFloat16 value) {
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, Half>) {
    return Half{__half_as_ushort(__float2half_rn(value))};
  } else {
    return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(value))};
  }
}

#else

inline float to_float(Half value) { return static_cast<float>(bits_as<_Float16>(value.bits)); }
inline float to_float(BFloat16 value) {
  return bits_as<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <typename T>
T from_float(float value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return value;
  } else if constexpr (std::is_same_v<T, Half>) {
    return Half{bits_as<uint16_t>(static_cast<_Float16>(value))};
  } else {  // rounds to the nearest, ties to even
    if (value != value) return BFloat16{0x7fc0};
    const auto bits = bits_as<uint32_t>(value);
    return BFloat16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
}

#endif

// N elements that are loaded or stored together, up to 16 bytes by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T element[N];

  __device__ __forceinline__ float operator[](int i) const { return to_float(element[i]); }
};

template <typename T>
constexpr int kWidest = 16 / sizeof(T);

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <typename T, int N>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& values) {
  *reinterpret_cast<Pack<T, N>*>(to) = values;
}

// The pointer, of which the compiler then knows that it is not to shared memory.
template <typename T>
__device__ __forceinline__ T* global(T* pointer) {
#ifndef SOFTMASK_ON_HOST
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Whether rows of a tensor can be read in packs of 16 bytes: its address, its strides and its width
// are multiples of a pack.
template <size_t Dimensions>
bool is_wide(const void* data, const int64_t (&strides)[Dimensions], int64_t width,
             int64_t element_size) {
  const int64_t pack = 16 / element_size;
  bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0 && width % pack == 0;
  for (const int64_t stride : strides) wide = wide && stride % pack == 0;
  return wide;
}

constexpr int64_t size_of(Type type) { return type == Type::kFloat ? 4 : 2; }

// Calls run(T{}, N) with the elements' type and the length of a pack, a constant.
template <typename Run>
void with_elements(Type type, bool wide, const Run& run) {
  const auto of_type = [&](auto element) {
    using T = decltype(element);
    if (wide) {
      run(element, std::integral_constant<int, kWidest<T>>{});
    } else {
      run(element, std::integral_constant<int, 1>{});
    }
  };
  if (type == Type::kFloat) of_type(float{});
  if (type == Type::kHalf) of_type(Half{});
  if (type == Type::kBFloat16) of_type(BFloat16{});
}

}  // namespace softmask::cuda
