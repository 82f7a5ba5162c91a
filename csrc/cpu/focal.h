// What the contrastive losses share: the positives of each row, and the focal term of one positive.

#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "types.h"

namespace softmask {

// The positives of row i are columns[first[i]] up to, but not including, columns[first[i + 1]], in
// ascending order.
struct Positives {
  std::vector<int64_t> first, columns;

  // Without ids, row i's positive is column `first_row + i`; with ids, all columns with its id.
  Positives(int64_t rows, int64_t width, int64_t first_row, const OptionalTensor& row_ids,
            const OptionalTensor& column_ids) {
    first.reserve(rows + 1);
    first.push_back(0);
    if (!row_ids.has_value()) {
      TORCH_CHECK_VALUE(rows == 0 || (first_row >= 0 && first_row + rows <= width),
                        "first_row: expected ", rows, " rows among ", width, " columns, got ",
                        first_row);
      for (int64_t i = 0; i < rows; ++i) columns.push_back(first_row + i), first.push_back(i + 1);
      return;
    }
    TORCH_CHECK_VALUE(
        column_ids.has_value() && row_ids->numel() == rows && column_ids->numel() == width,
        "ids: expected ", rows, " of rows and ", width, " of columns");
    const at::Tensor own = row_ids->contiguous(), other = column_ids->contiguous();
    const int64_t* ids = other.const_data_ptr<int64_t>();
    std::vector<int64_t> order(other.numel());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return ids[a] < ids[b]; });
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t id = own.const_data_ptr<int64_t>()[i];
      auto next =
          std::lower_bound(order.begin(), order.end(), id,
                           [&](int64_t column, int64_t wanted) { return ids[column] < wanted; });
      for (; next != order.end() && ids[*next] == id; ++next) columns.push_back(*next);
      first.push_back(static_cast<int64_t>(columns.size()));
    }
  }

  static Positives none(int64_t rows) {
    Positives positives(0, 0, 0, std::nullopt, std::nullopt);
    positives.first.resize(rows + 1);
    return positives;
  }

  int64_t count(int64_t row) const { return first[row + 1] - first[row]; }
};

// -(1 - p)^gamma log p, and h(p) = p d/dp [(1 - p)^gamma log p], at p = e^log_p. 1 - p is kept
// above 0, where gamma in (0, 1) has no derivative, and log p at most 0, which rounding may exceed.
// gamma = 0 is exactly cross-entropy.
struct Focal {
  double gamma;

  static double miss(double log_p) {
    return std::max(-std::expm1(log_p), std::numeric_limits<double>::min());
  }
  double loss(double log_p) const {
    log_p = std::min(log_p, 0.0);
    return gamma == 0.0 ? -log_p : -std::pow(miss(log_p), gamma) * log_p;
  }
  double slope(double log_p) const {
    if (gamma == 0.0) return 1.0;
    log_p = std::min(log_p, 0.0);
    const double wrong = miss(log_p), power = std::pow(wrong, gamma);
    return power - gamma * std::exp(log_p) * (power / wrong) * log_p;
  }
};

}  // namespace softmask
