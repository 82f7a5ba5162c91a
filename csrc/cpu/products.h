// Matrix products whose results are consumed in the cache, for processors with 32-byte vectors.
//
// There torch's BLAS reaches half of what the processor can (docs/cpu.md), and a caller with its
// own tiles saves a pass over memory between a product and its use. Wider vectors are left to BLAS,
// which is well tuned for them.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace softmask::products {

constexpr int kRows = 6;            // rows of a result in registers
constexpr int64_t kPanel = 16;      // columns of a result in registers
constexpr int64_t kTogether = 256;  // terms of a partial sum

inline bool are_ours(at::ScalarType type) {
  return type == at::kFloat && simd::vector_bytes() == 32;
}

// to [rows, columns] = factor * left right, or += with `add`. left(r, k) = left[r * by_row + k *
// by_step]; right is packed: [columns / kPanel, steps, kPanel].
struct Product {
  float* to;
  int64_t pitch;
  bool add;
  float factor;
  const float* left;
  int64_t by_row, by_step;
  const float* right;
  int64_t rows, columns, steps;
};

// kRows x kPanel sums in registers, with `steps` terms each; row r of the left side is at
// left[row[r]].
template <int Bytes>
struct Sums {
  static constexpr int kLanes = simd::kLanesOf<float, Bytes>;
  static constexpr int kVectors = static_cast<int>(kPanel) / kLanes;
  using V = simd::Vector<float, Bytes>;

  V of[kRows][kVectors];

  SOFTMASK_INLINE void add_up(const float* left, const int64_t (&row)[kRows], int64_t by_step,
                              const float* right, int64_t steps) {
    V sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < steps; ++k, left += by_step, right += kPanel) {
      V panel[kVectors];
      for (int v = 0; v < kVectors; ++v) panel[v] = simd::load<Bytes, float>(right + v * kLanes);
      SOFTMASK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const float factor = left[row[r]];
        for (int v = 0; v < kVectors; ++v) sums[r][v] += factor * panel[v];
      }
    }
    SOFTMASK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) of[r][v] = sums[r][v];
    }
  }
};

struct Multiply {
  template <int Bytes>
  static SOFTMASK_INLINE void run(const Product& product) {
    for (int64_t first = 0; first == 0 || first < product.steps; first += kTogether) {
      const int64_t steps = std::min(kTogether, product.steps - first);
      for (int64_t column = 0; column < product.columns; column += kPanel) {
        const float* right = product.right + column * product.steps + first * kPanel;
        for (int64_t r = 0; r < product.rows; r += kRows) {
          part<Bytes>(product, r, column, first, right, steps);
        }
      }
    }
  }

 private:
  // Prefetches the destination of the sums while they are computed.
  static SOFTMASK_INLINE void fetch(const Product& product, int64_t r, int64_t column) {
    const float* to = product.to + r * product.pitch + column;
    for (int64_t i = r; i < product.rows && i < r + kRows; ++i, to += product.pitch) {
      __builtin_prefetch(to, 1);
    }
  }

  template <int Bytes>
  static SOFTMASK_INLINE void store_all(const Product& product, const Sums<Bytes>& sums, bool add,
                                        float* to) {
    SOFTMASK_UNROLL
    for (int i = 0; i < kRows; ++i, to += product.pitch) {
      for (int v = 0; v < sums.kVectors; ++v) {
        float* at = to + v * sums.kLanes;
        auto result = sums.of[i][v] * product.factor;
        if (add) result += simd::load<Bytes, float>(at);
        simd::store(at, result);
      }
    }
  }

  template <int Bytes>
  static SOFTMASK_INLINE void part(const Product& product, int64_t r, int64_t column, int64_t first,
                                   const float* right, int64_t steps) {
    int64_t row[kRows];  // rows past the end repeat the last one; their sums are dropped
    for (int i = 0; i < kRows; ++i) row[i] = std::min(r + i, product.rows - 1) * product.by_row;
    Sums<Bytes> sums;
    if (product.add) fetch(product, r, column);
    sums.add_up(product.left + first * product.by_step, row, product.by_step, right, steps);
    const int64_t rows = std::min<int64_t>(kRows, product.rows - r),
                  columns = std::min(kPanel, product.columns - column);
    const bool add = product.add || first > 0;
    float* to = product.to + r * product.pitch + column;
    if (rows == kRows && columns == kPanel) return store_all<Bytes>(product, sums, add, to);
    for (int64_t i = 0; i < rows; ++i, to += product.pitch) {
      for (int v = 0; v < sums.kVectors; ++v) {
        const int64_t lane = v * sums.kLanes, left = columns - lane;
        if (left <= 0) break;
        auto result = sums.of[i][v] * product.factor;
        if (add) result += simd::load_some<Bytes>(to + lane, left, 0.0f);
        simd::store_some(to + lane, result, left);
      }
    }
  }
};

// Transposes kLanes rows, `by_row` apart, into one vector of a panel at each of kLanes steps.
template <int Bytes>
SOFTMASK_INLINE void transpose(const float* from, int64_t by_row, float* to) {
  constexpr int kLanes = simd::kLanesOf<float, Bytes>;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
  simd::Vector<float, Bytes> rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = simd::load<Bytes, float>(from + r * by_row);
  simd::transpose<1>(rows, kAll);
  for (int k = 0; k < kLanes; ++k) simd::store(to + k * kPanel, rows[k]);
}

// Packs the right side of a product, with element (k, column) at from[k * by_step + column *
// by_column], into panels [columns / kPanel, steps, kPanel] with zeros beyond the last column.
struct Pack {
  template <int Bytes>
  static SOFTMASK_INLINE void run(const float* from, int64_t by_column, int64_t by_step,
                                  int64_t columns, int64_t steps, float* to) {
    if (by_column == 1) return slices(from, by_step, columns, steps, to);
    constexpr int kLanes = simd::kLanesOf<float, Bytes>;
    for (int64_t first = 0; first < columns; first += kPanel, to += steps * kPanel) {
      const float* panel = from + first * by_column;
      const int64_t here = std::min(kPanel, columns - first);
      int64_t k = 0;
      if (by_step == 1 && here == kPanel) {
        for (; k + kLanes <= steps; k += kLanes) {
          for (int64_t c = 0; c < kPanel; c += kLanes) {
            transpose<Bytes>(panel + c * by_column + k, by_column, to + k * kPanel + c);
          }
        }
      }
      for (; k < steps; ++k) {
        float* slice = to + k * kPanel;
        for (int64_t c = 0; c < here; ++c) slice[c] = panel[c * by_column + k * by_step];
        std::fill(slice + here, slice + kPanel, 0.0f);
      }
    }
  }

 private:
  static SOFTMASK_INLINE void slices(const float* from, int64_t by_step, int64_t columns,
                                     int64_t steps, float* to) {
    for (int64_t k = 0; k < steps; ++k, from += by_step) {
      for (int64_t column = 0; column < columns; column += kPanel) {
        float* slice = to + column * steps + k * kPanel;
        const int64_t here = std::min(kPanel, columns - column);
        if (here == kPanel) {
          std::memcpy(slice, from + column, kPanel * sizeof(float));
        } else {
          for (int64_t c = 0; c < here; ++c) slice[c] = from[column + c];
          for (int64_t c = here; c < kPanel; ++c) slice[c] = 0.0f;
        }
      }
    }
  }
};

// Rounds up to a multiple of kPanel.
inline int64_t padded(int64_t size) { return (size + kPanel - 1) / kPanel * kPanel; }

// Packs rows [count, width] as the right side of products with each of them.
inline at::Tensor packed_rows(const at::Tensor& rows) {
  const int64_t count = rows.size(0), width = rows.size(1);
  const at::Tensor packed = at::empty({padded(count), width}, rows.options());
  const auto* from = rows.const_data_ptr<float>();
  auto* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, padded(count) / kPanel, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kPanel;
    simd::run<Pack>(from + first * rows.stride(0), rows.stride(0), rows.stride(1),
                    std::min(end * kPanel, count) - first, width, to + first * width);
  });
  return packed;
}

}  // namespace softmask::products
