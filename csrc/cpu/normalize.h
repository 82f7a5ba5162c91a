// norm(map) for all ops that take maps, in double precision whatever the map's type.

#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <string_view>

namespace softmask {

constexpr double kNormalizeEps = 1e-7;  // reference.NORMALIZE_EPS

enum class Normalize { kNone, kMinmax, kMax, kSum };

inline Normalize parse_normalize(std::string_view name) {
  if (name == "none") return Normalize::kNone;
  if (name == "minmax") return Normalize::kMinmax;
  if (name == "max") return Normalize::kMax;
  if (name == "sum") return Normalize::kSum;
  TORCH_CHECK_VALUE(false, "normalize: expected none, minmax, max or sum, got ", name);
}

// norm(c) = (c - low) / range of one map, and the gradient through it.
class Normalizer {
 public:
  template <typename map_t>
  Normalizer(const map_t* map, int64_t size, Normalize mode) : mode_(mode) {
    if (mode == Normalize::kNone) return;
    if (mode == Normalize::kSum) {
      double sum = 0.0;
      for (int64_t i = 0; i < size; ++i) sum += map[i];
      range_ = sum + kNormalizeEps;
      return;
    }
    double low = map[0], high = map[0];
    for (int64_t i = 1; i < size; ++i) {  // propagates NaN, as torch does
      low = (map[i] < low || std::isnan(map[i])) ? map[i] : low;
      high = (map[i] > high || std::isnan(map[i])) ? map[i] : high;
    }
    low_ = mode == Normalize::kMinmax ? low : 0.0;
    range_ = high - low_ + kNormalizeEps;
    high_ = high;
  }

  double operator()(double value) const { return (value - low_) / range_; }

  // d loss / d norm(c) -> d loss / d c, in place. Elements tied for min or max share the gradient
  // evenly.
  template <typename map_t>
  void backward(const map_t* map, double* grad, int64_t size) const {
    if (mode_ == Normalize::kNone) return;
    double sum = 0.0, weighted = 0.0;  // sums of grad and of grad * norm(c)
    int64_t lowest = 0, highest = 0;
    for (int64_t i = 0; i < size; ++i) {
      sum += grad[i];
      weighted += grad[i] * (*this)(map[i]);
      lowest += map[i] == low_;
      highest += map[i] == high_;
    }
    for (int64_t i = 0; i < size; ++i) {
      double total = grad[i];
      if (mode_ == Normalize::kSum) total -= weighted;
      if (mode_ != Normalize::kSum && map[i] == high_) total -= weighted / highest;
      if (mode_ == Normalize::kMinmax && map[i] == low_) total += (weighted - sum) / lowest;
      grad[i] = total / range_;
    }
  }

 private:
  Normalize mode_;
  double low_ = 0.0, high_ = 0.0, range_ = 1.0;
};

}  // namespace softmask
