// What the implementations of the contrastive loss share: the problem, the statistics kept for the
// backward pass, and the gradient with respect to the logits.

#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "focal.h"
#include "simd.h"
#include "types.h"

namespace softmask {

// With `both`, rows and columns are the same samples, and loss_i is the mean of row i's and column
// i's loss.
struct Problem {
  at::Tensor rows, columns;  // [B, D], [G, D]
  double scale;
  Focal focal;
  Positives positives;
  bool both, with_ids;

  Problem(const at::Tensor& rows, const at::Tensor& columns, const at::Tensor& scale,
          const at::Tensor& gamma, const OptionalTensor& row_ids, const OptionalTensor& column_ids,
          int64_t first_row, bool both)
      : rows(rows.to(compute_type(rows)).contiguous()),
        columns(columns.to(compute_type(rows)).contiguous()),
        scale(scale.item<double>()),
        focal{gamma.item<double>()},
        positives(rows.size(0), columns.size(0), first_row, row_ids, column_ids),
        both(both),
        with_ids(row_ids.has_value()) {
    TORCH_CHECK_VALUE(!both || rows.size(0) == columns.size(0),
                      "columns: expected as many as rows, ", rows.size(0), ", got ",
                      columns.size(0));
  }

  int64_t height() const { return rows.size(0); }
  int64_t width() const { return columns.size(0); }
  double share() const { return both ? 0.5 : 1.0; }  // weight of a direction
};

// For each row, or each column: the log-sum-exp of its logits (highest + rest), and the sum of y
// h(p) over its positives (slope), which is 1 for gamma = 0.
template <typename acc_t>
struct Side {
  acc_t *highest, *rest, *slope;

  simd::LogSum<acc_t> log_sum(int64_t i) const { return {highest[i], rest[i]}; }
  Side from(int64_t i) const { return {highest + i, rest + i, slope + i}; }
};

template <typename acc_t>
struct Statistics {
  Side<acc_t> rows, columns;  // columns is empty without `both`

  Statistics(const Problem& problem, const at::Tensor& memory)
      : rows(side(memory, 0)), columns(problem.both ? side(memory, 3) : Side<acc_t>{}) {}

  // Allocates the statistics. With ids, an additional last row holds 1 / (number of positives).
  static at::Tensor empty(const Problem& problem) {
    const int64_t sides = problem.both ? 6 : 3;
    const at::Tensor memory =
        at::empty({sides + problem.with_ids, problem.height()}, problem.rows.options());
    if (problem.with_ids) {
      acc_t* shares = memory.mutable_data_ptr<acc_t>() + sides * problem.height();
      for (int64_t i = 0; i < problem.height(); ++i) {
        shares[i] = 1 / static_cast<acc_t>(problem.positives.count(i));
      }
    }
    return memory;
  }

 private:
  static Side<acc_t> side(const at::Tensor& memory, int64_t first) {
    acc_t* data = memory.mutable_data_ptr<acc_t>() + first * memory.size(1);
    return {data, data + memory.size(1), data + 2 * memory.size(1)};
  }
};

// Stands in for a positive's product, so that RowGradient skips it.
constexpr float kNowhere = -1e30f;

// Turns a row of products into the gradient with respect to the logits, leaving out positives, and
// sums gradient times product.
struct RowGradient {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* row, int64_t size, acc_t scale, acc_t weight,
                                  const simd::LogSum<acc_t>& sum, const acc_t* column_weight,
                                  const Side<acc_t>& columns, acc_t* at_scale) {
    constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
    simd::Vector<acc_t, Bytes> total{};
    for (int64_t j = 0; j < size; j += kLanes) {
      const auto product = simd::load_some<Bytes>(row + j, size - j, acc_t(0));
      const auto z = product * scale;
      auto gradient = simd::exp_nonpositive(z - sum.highest - sum.rest) * weight;
      if (column_weight != nullptr) {
        const auto highest = simd::load_some<Bytes>(columns.highest + j, size - j, acc_t(0));
        const auto rest = simd::load_some<Bytes>(columns.rest + j, size - j, acc_t(0));
        const auto by_column = simd::load_some<Bytes>(column_weight + j, size - j, acc_t(0));
        gradient += simd::exp_nonpositive(z - highest - rest) * by_column;
      }
      const auto nowhere = simd::Vector<acc_t, Bytes>{} + acc_t(kNowhere);
      gradient = product == nowhere ? simd::Vector<acc_t, Bytes>{} : gradient;
      total += gradient * product;
      simd::store_some(row + j, gradient, size - j);
    }
    *at_scale = simd::sum_lanes(total);
  }
};

// The gradient with respect to a positive's logit. It is a difference that may cancel, so it is
// computed separately, in double. by_row and by_column are d loss / d log-sum-exp.
template <typename acc_t>
double gradient_of_positive(const Problem& problem, const Statistics<acc_t>& statistics,
                            const acc_t* grad, double by_row, const acc_t* by_column, int64_t row,
                            int64_t column, acc_t logit) {
  const auto of = [&](const Side<acc_t>& side, int64_t i, double weight) {
    const double log_p = side.log_sum(i).log_probability(logit);
    const double target =
        problem.share() * grad[i] / double(problem.positives.count(i)) * problem.focal.slope(log_p);
    return weight * std::exp(log_p) - target;
  };
  const double gradient = of(statistics.rows, row, by_row);
  return problem.both ? gradient + of(statistics.columns, column, by_column[column]) : gradient;
}

}  // namespace softmask
