// Matrix products whose results are consumed in the cache.
//
// A caller with its own tiles saves a pass over memory between a product and its use, and BLAS's
// overhead where products are small. Large products are ours where torch's BLAS, which is Intel's,
// was measured to be slower (docs/cpu.md): with 32-byte vectors, and on AMD's processors.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace softmask::products {

template <int Bytes>
constexpr int kRowsOf = Bytes == 64   ? 12
                        : Bytes == 32 ? 6
                                      : 2;  // of a result in registers
template <typename acc_t>
constexpr int64_t kPanelOf = 64 / sizeof(acc_t);  // columns of a result in registers
constexpr int64_t kPanel = kPanelOf<float>;
constexpr int64_t kTogether = 256;  // terms of a partial sum

inline bool is_amd() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
#else
  return false;
#endif
}

inline bool are_ours(at::ScalarType type) {
  const int bytes = simd::vector_bytes();
  return type == at::kFloat && (bytes == 32 || (bytes == 64 && is_amd()));
}

// to [rows, columns] = factor * left right, or += with `add`. left(r, k) = left[r * by_row + k *
// by_step]; right is packed: [columns / kPanel, steps, kPanel].
template <typename acc_t>
struct Product {
  acc_t* to;
  int64_t pitch;
  bool add;
  acc_t factor;
  const acc_t* left;
  int64_t by_row, by_step;
  const acc_t* right;
  int64_t rows, columns, steps;
};

// kRows x kPanel sums in registers, with `steps` terms each; row r of the left side is at
// left[row[r]].
template <typename acc_t, int Bytes>
struct Sums {
  static constexpr int kRows = kRowsOf<Bytes>;
  static constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
  static constexpr int64_t kPanel = kPanelOf<acc_t>;
  static constexpr int kVectors = static_cast<int>(kPanel) / kLanes;
  using V = simd::Vector<acc_t, Bytes>;

  V of[kRows][kVectors];

  SOFTMASK_INLINE void add_up(const acc_t* left, const int64_t (&row)[kRows], int64_t by_step,
                              const acc_t* right, int64_t steps) {
    V sums[kRows][kVectors] = {};
    for (int64_t k = 0; k < steps; ++k, left += by_step, right += kPanel) {
      V panel[kVectors];
      for (int v = 0; v < kVectors; ++v) panel[v] = simd::load<Bytes, acc_t>(right + v * kLanes);
      SOFTMASK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const acc_t factor = left[row[r]];
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
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Product<acc_t>& product) {
    constexpr int64_t kRows = kRowsOf<Bytes>, kPanel = kPanelOf<acc_t>;
    for (int64_t first = 0; first == 0 || first < product.steps; first += kTogether) {
      const int64_t steps = std::min(kTogether, product.steps - first);
      for (int64_t column = 0; column < product.columns; column += kPanel) {
        const acc_t* right = product.right + column * product.steps + first * kPanel;
        for (int64_t r = 0; r < product.rows; r += kRows) {
          part<Bytes>(product, r, column, first, right, steps);
        }
      }
    }
  }

 private:
  // Prefetches the destination of the sums while they are computed.
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void fetch(const Product<acc_t>& product, int64_t r, int64_t column) {
    const acc_t* to = product.to + r * product.pitch + column;
    for (int64_t i = r; i < product.rows && i < r + kRowsOf<Bytes>; ++i, to += product.pitch) {
      __builtin_prefetch(to, 1);
    }
  }

  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void store_all(const Product<acc_t>& product,
                                        const Sums<acc_t, Bytes>& sums, bool add, acc_t* to) {
    SOFTMASK_UNROLL
    for (int i = 0; i < sums.kRows; ++i, to += product.pitch) {
      for (int v = 0; v < sums.kVectors; ++v) {
        acc_t* at = to + v * sums.kLanes;
        auto result = sums.of[i][v] * product.factor;
        if (add) result += simd::load<Bytes, acc_t>(at);
        simd::store(at, result);
      }
    }
  }

  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void part(const Product<acc_t>& product, int64_t r, int64_t column,
                                   int64_t first, const acc_t* right, int64_t steps) {
    constexpr int kRows = kRowsOf<Bytes>;
    constexpr int64_t kPanel = kPanelOf<acc_t>;
    int64_t row[kRows];  // rows past the end repeat the last one; their sums are dropped
    for (int i = 0; i < kRows; ++i) row[i] = std::min(r + i, product.rows - 1) * product.by_row;
    Sums<acc_t, Bytes> sums;
    if (product.add) fetch<Bytes>(product, r, column);
    sums.add_up(product.left + first * product.by_step, row, product.by_step, right, steps);
    const int64_t rows = std::min<int64_t>(kRows, product.rows - r),
                  columns = std::min(kPanel, product.columns - column);
    const bool add = product.add || first > 0;
    acc_t* to = product.to + r * product.pitch + column;
    if (rows == kRows && columns == kPanel) return store_all<Bytes>(product, sums, add, to);
    for (int64_t i = 0; i < rows; ++i, to += product.pitch) {
      for (int v = 0; v < sums.kVectors; ++v) {
        const int64_t lane = v * sums.kLanes, left = columns - lane;
        if (left <= 0) break;
        auto result = sums.of[i][v] * product.factor;
        if (add) result += simd::load_some<Bytes>(to + lane, left, acc_t(0));
        simd::store_some(to + lane, result, left);
      }
    }
  }
};

// Transposes kLanes rows, `by_row` apart, into one vector of a panel at each of kLanes steps.
template <int Bytes, typename acc_t>
SOFTMASK_INLINE void transpose(const acc_t* from, int64_t by_row, acc_t* to) {
  constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
  constexpr auto kAll = std::make_integer_sequence<int, kLanes>{};
  simd::Vector<acc_t, Bytes> rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = simd::load<Bytes, acc_t>(from + r * by_row);
  simd::transpose<1>(rows, kAll);
  for (int k = 0; k < kLanes; ++k) simd::store(to + k * kPanelOf<acc_t>, rows[k]);
}

// Packs the right side of a product, with element (k, column) at from[k * by_step + column *
// by_column], into panels [columns / kPanel, steps, kPanel] with zeros beyond the last column.
struct Pack {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const acc_t* from, int64_t by_column, int64_t by_step,
                                  int64_t columns, int64_t steps, acc_t* to) {
    if (by_column == 1) return slices(from, by_step, columns, steps, to);
    constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
    constexpr int64_t kPanel = kPanelOf<acc_t>;
    for (int64_t first = 0; first < columns; first += kPanel, to += steps * kPanel) {
      const acc_t* panel = from + first * by_column;
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
        acc_t* slice = to + k * kPanel;
        for (int64_t c = 0; c < here; ++c) slice[c] = panel[c * by_column + k * by_step];
        std::fill(slice + here, slice + kPanel, acc_t(0));
      }
    }
  }

 private:
  template <typename acc_t>
  static SOFTMASK_INLINE void slices(const acc_t* from, int64_t by_step, int64_t columns,
                                     int64_t steps, acc_t* to) {
    constexpr int64_t kPanel = kPanelOf<acc_t>;
    for (int64_t k = 0; k < steps; ++k, from += by_step) {
      for (int64_t column = 0; column < columns; column += kPanel) {
        acc_t* slice = to + column * steps + k * kPanel;
        const int64_t here = std::min(kPanel, columns - column);
        if (here == kPanel) {
          std::memcpy(slice, from + column, kPanel * sizeof(acc_t));
        } else {
          for (int64_t c = 0; c < here; ++c) slice[c] = from[column + c];
          for (int64_t c = here; c < kPanel; ++c) slice[c] = acc_t(0);
        }
      }
    }
  }
};

// Rounds up to whole panels.
template <typename acc_t = float>
constexpr int64_t padded(int64_t size) {
  return (size + kPanelOf<acc_t> - 1) / kPanelOf<acc_t> * kPanelOf<acc_t>;
}

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
