// The contrastive loss and its gradients by tiles of logits, each of which goes from products to
// gradients in one thread's cache.
//
// The tiles of one step share no row and no column, so threads add to the sums of both without
// synchronization, and every sum has a fixed order. A tile takes one exponential per logit,
// relative to the tile's largest logit, for both rows and columns: in the forward pass it is a term
// of their sums; in the backward pass, times e^(largest - log-sum-exp), it gives both
// probabilities. If a row's or column's own logits are too far below the largest for that, its
// exponentials are computed separately.

#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "contrastive_problem.h"
#include "products.h"
#include "simd.h"

namespace softmask::tiles {

constexpr int64_t kLargest = 192, kSmallest = 48;  // sides of a tile; multiples of kPanel and kRows
constexpr int64_t kPitch = kLargest + 8;           // between rows of a tile; not a power of two
constexpr float kEnough = 1e-20f;  // larger sums of exponentials lost nothing to underflow
constexpr double kFar = 40.0;      // e^40 times an exponential that underflowed is negligible

struct Tile {
  int64_t row, column, rows, columns;
};

// How rows and columns are split into tiles: several tiles per step and thread, if there are
// enough.
struct Grid {
  int64_t height, width, tall, wide, down, across;

  Grid(int64_t height, int64_t width)
      : height(height),
        width(width),
        tall(side(height)),
        wide(side(width)),
        down((height + tall - 1) / tall),
        across((width + wide - 1) / wide) {}

  static int64_t side(int64_t size) {
    const int64_t wanted = size / (4 * at::get_num_threads());
    return std::clamp((wanted + kSmallest - 1) / kSmallest * kSmallest, kSmallest, kLargest);
  }
  // Number of tiles in a step.
  int64_t together() const { return std::min(down, across); }
  int64_t steps() const { return std::max(down, across); }
  Tile tile(int64_t step, int64_t index) const {
    const int64_t i = down <= across ? index : (index + step) % down;
    const int64_t j = down <= across ? (index + step) % across : index;
    return {i * tall, j * wide, std::min(tall, height - i * tall),
            std::min(wide, width - j * wide)};
  }
};

inline bool are_worth_it(const Problem& problem) {
  const Grid grid(problem.height(), problem.width());
  return products::are_ours(problem.rows.scalar_type()) && problem.scale != 0.0 &&
         grid.together() >= 2 * at::get_num_threads();
}

// Scratch memory of a thread: a tile, one side of a product in panels, and numbers per row and
// column of the tile.
struct Room {
  float *tile, *panels, *of_rows, *of_columns, *highest_rows, *highest_columns;

  static int64_t size(int64_t depth) { return kLargest * (kPitch + products::padded(depth) + 4); }
  Room(float* memory, int64_t depth)
      : tile(memory),
        panels(tile + kLargest * kPitch),
        of_rows(panels + kLargest * products::padded(depth)),
        of_columns(of_rows + kLargest),
        highest_rows(of_columns + kLargest),
        highest_columns(highest_rows + kLargest) {}
};

// A positive: where its logit is stored, the logit, and the gradient with respect to it.
struct Target {
  float *place, logit;
  double gradient;
  int64_t sample;
};

// Calls work(tile, room) on every tile, with its logits in room.tile. Each logit is rounded once:
// all uses must see the same number, or terms do not cancel where a probability is 1.
template <typename Work>
void for_each(const Problem& problem, const Work& work) {
  const Grid grid(problem.height(), problem.width());
  const at::Tensor packed = products::packed_rows(problem.columns);
  const int64_t depth = problem.rows.size(1), size = Room::size(depth);
  const at::Tensor memory = at::empty({at::get_num_threads(), size}, problem.rows.options());
  const auto* rows = problem.rows.const_data_ptr<float>();
  const auto* columns = packed.const_data_ptr<float>();
  auto* rooms = memory.mutable_data_ptr<float>();
  for (int64_t step = 0; step < grid.steps(); ++step) {
    at::parallel_for(0, grid.together(), 1, [&](int64_t begin, int64_t end) {
      const Room room(rooms + at::get_thread_num() * size, depth);
      for (int64_t index = begin; index < end; ++index) {
        const Tile tile = grid.tile(step, index);
        simd::run<products::Multiply>(products::Product<float>{
            room.tile, kPitch, /*add=*/false, static_cast<float>(problem.scale),
            rows + tile.row * depth, depth, 1, columns + tile.column * depth, tile.rows,
            tile.columns, depth});
        work(tile, room);
      }
    });
  }
}

// Calls positive(k, column in the tile) for each positive of row `sample` in the tile.
template <typename Positive>
void for_each_positive(const Positives& positives, const Tile& tile, int64_t sample,
                       const Positive& positive) {
  const auto begin = positives.columns.begin() + positives.first[sample],
             end = positives.columns.begin() + positives.first[sample + 1];
  for (auto at = std::lower_bound(begin, end, tile.column);
       at != end && *at < tile.column + tile.columns; ++at) {
    positive(at - positives.columns.begin(), *at - tile.column);
  }
}

// The largest logit of a tile.
struct Highest {
  template <int Bytes>
  static SOFTMASK_INLINE void run(const float* logits, const Tile& tile, float* highest) {
    constexpr int kLanes = simd::kLanesOf<float, Bytes>;
    auto most = simd::splat<Bytes>(simd::kLowest<float>);
    for (int64_t i = 0; i < tile.rows; ++i, logits += kPitch) {
      int64_t j = 0;
      for (; j + kLanes <= tile.columns; j += kLanes) {
        const auto z = simd::load<Bytes, float>(logits + j);
        most = z > most ? z : most;
      }
      for (; j < tile.columns; ++j) most[0] = std::max(most[0], logits[j]);
    }
    *highest = simd::max_lanes(most);
  }
};

// Sums of e^(logit - highest) over rows and over columns.
struct Sums {
  template <int Bytes>
  static SOFTMASK_INLINE void run(const float* logits, const Tile& tile, float highest,
                                  float* of_rows, float* of_columns) {
    constexpr int kLanes = simd::kLanesOf<float, Bytes>;
    std::fill_n(of_columns, tile.columns, 0.0f);
    for (int64_t i = 0; i < tile.rows; ++i, logits += kPitch) {
      simd::Vector<float, Bytes> row{};
      for (int64_t j = 0; j < tile.columns; j += kLanes) {
        const int64_t left = tile.columns - j;
        const auto z = simd::load_some<Bytes>(logits + j, left, 0.0f);
        auto e = simd::exp_nonpositive(z - highest);
        if (left < kLanes) e = simd::first_lanes(e, left);
        row += e;
        simd::store_some(of_columns + j, simd::load_some<Bytes>(of_columns + j, left, 0.0f) + e,
                         left);
      }
      of_rows[i] = simd::sum_lanes(row);
    }
  }
};

// The sum of exponentials of `size` logits, `stride` apart, relative to their own maximum.
inline void sum_alone(const float* logits, int64_t stride, int64_t size, float* highest,
                      float* sum) {
  *highest = simd::kLowest<float>;
  for (int64_t i = 0; i < size; ++i) *highest = std::max(*highest, logits[i * stride]);
  *sum = 0.0f;
  for (int64_t i = 0; i < size; ++i) *sum += std::exp(logits[i * stride] - *highest);
}

// Adds a tile's sums to running sums, each relative to its own largest logit.
struct Merge {
  template <int Bytes>
  static SOFTMASK_INLINE void run(float* highest, float* sums, const float* new_highest,
                                  const float* new_sums, int64_t size) {
    constexpr int kLanes = simd::kLanesOf<float, Bytes>;
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t left = size - i;
      const auto before = simd::load_some<Bytes>(highest + i, left, 0.0f);
      const auto added = simd::load_some<Bytes>(new_highest + i, left, 0.0f);
      const auto most = added > before ? added : before;
      const auto sum =
          simd::load_some<Bytes>(sums + i, left, 0.0f) * simd::exp_nonpositive(before - most) +
          simd::load_some<Bytes>(new_sums + i, left, 0.0f) * simd::exp_nonpositive(added - most);
      simd::store_some(highest + i, most, left);
      simd::store_some(sums + i, sum, left);
    }
  }
};

// Splits the log-sum-exp into a float and a remainder, so that together they keep the precision of
// the sum.
inline void finish(const Side<float>& side, const std::vector<float>& sums) {
  for (size_t i = 0; i < sums.size(); ++i) {
    const double exact = double(side.highest[i]) + std::log(double(sums[i]));
    side.highest[i] = static_cast<float>(exact);
    side.rest[i] = static_cast<float>(exact - side.highest[i]);
  }
}

// Computes the log-sum-exps of both sides and stores the logits of the positives.
inline void log_sums(const Problem& problem, const Statistics<float>& statistics, float* logits) {
  const Side<float>&rows = statistics.rows, &columns = statistics.columns;
  std::vector<float> row_sums(problem.height()), column_sums(problem.both ? problem.width() : 0);
  std::fill_n(rows.highest, row_sums.size(), simd::kLowest<float>);
  std::fill_n(columns.highest, column_sums.size(), simd::kLowest<float>);
  for_each(problem, [&](const Tile& tile, const Room& room) {
    float highest;
    simd::run<Highest>(room.tile, tile, &highest);
    simd::run<Sums>(room.tile, tile, highest, room.of_rows, room.of_columns);
    std::fill_n(room.highest_rows, tile.rows, highest);
    std::fill_n(room.highest_columns, tile.columns, highest);
    for (int64_t i = 0; i < tile.rows; ++i) {
      const float* row = room.tile + i * kPitch;
      for_each_positive(problem.positives, tile, tile.row + i,
                        [&](int64_t k, int64_t j) { logits[k] = row[j]; });
      if (room.of_rows[i] > kEnough) continue;
      sum_alone(row, 1, tile.columns, room.highest_rows + i, room.of_rows + i);
    }
    simd::run<Merge>(rows.highest + tile.row, row_sums.data() + tile.row, room.highest_rows,
                     room.of_rows, tile.rows);
    if (!problem.both) return;
    for (int64_t j = 0; j < tile.columns; ++j) {
      if (room.of_columns[j] > kEnough) continue;
      sum_alone(room.tile + j, kPitch, tile.rows, room.highest_columns + j, room.of_columns + j);
    }
    simd::run<Merge>(columns.highest + tile.column, column_sums.data() + tile.column,
                     room.highest_columns, room.of_columns, tile.columns);
  });
  finish(rows, row_sums);
  finish(columns, column_sums);
}

// Turns logits into their gradients, leaving out positives: e^(logit - highest) * (by_row +
// by_column). Adds each row's sum of gradient times logit to at_scale.
struct GradientAtOnce {
  template <int Bytes>
  static SOFTMASK_INLINE void run(float* logits, const Tile& tile, float highest,
                                  const float* by_row, const float* by_column, double* at_scale) {
    constexpr int kLanes = simd::kLanesOf<float, Bytes>;
    for (int64_t i = 0; i < tile.rows; ++i, logits += kPitch) {
      simd::Vector<float, Bytes> total{};
      for (int64_t j = 0; j < tile.columns; j += kLanes) {
        const int64_t left = tile.columns - j;
        const auto z = simd::load_some<Bytes>(logits + j, left, 0.0f);
        const auto weight = simd::load_some<Bytes>(by_column + j, left, 0.0f) + by_row[i];
        auto gradient = simd::exp_nonpositive(z - highest) * weight;
        if (left < kLanes) gradient = simd::first_lanes(gradient, left);
        total += gradient * z;
        simd::store_some(logits + j, gradient, left);
      }
      at_scale[i] += simd::sum_lanes(total);
    }
  }
};

// to = weight * e^(highest - log-sum-exp); returns false if any of them is out of range.
inline bool relative_weights(const Side<float>& side, const float* weight, float highest,
                             int64_t first, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    const double above = double(highest) - side.highest[first + i] - side.rest[first + i];
    if (!(above < kFar)) return false;
    to[i] = static_cast<float>(weight[first + i] * std::exp(above));
  }
  return true;
}

// d loss / d log-sum-exp of each row or column.
inline std::vector<float> weights(const Problem& problem, const float* grad,
                                  const Side<float>& side, int64_t count) {
  std::vector<float> to(count);
  for (int64_t i = 0; i < count; ++i) {
    to[i] = static_cast<float>(problem.share() * grad[i] * side.slope[i]);
  }
  return to;
}

inline double gradients(const Problem& problem, const Statistics<float>& statistics,
                        const float* grad, const at::Tensor& rows_grad,
                        const at::Tensor& columns_grad) {
  const auto scale = static_cast<float>(problem.scale);
  const int64_t depth = problem.rows.size(1);
  const Side<float>&rows = statistics.rows, &columns = statistics.columns;
  const std::vector<float> row_weight = weights(problem, grad, rows, problem.height()),
                           column_weight =
                               weights(problem, grad, columns, problem.both ? problem.width() : 0);
  rows_grad.zero_();
  columns_grad.zero_();
  auto *to_rows = rows_grad.mutable_data_ptr<float>(),
       *to_columns = columns_grad.mutable_data_ptr<float>();
  const auto *row_data = problem.rows.const_data_ptr<float>(),
             *column_data = problem.columns.const_data_ptr<float>();
  std::vector<double> at_scale(problem.height());
  for_each(problem, [&](const Tile& tile, const Room& room) {
    float highest;
    simd::run<Highest>(room.tile, tile, &highest);
    std::vector<Target> targets;
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t sample = tile.row + i;
      for_each_positive(problem.positives, tile, sample, [&](int64_t, int64_t j) {
        float* place = room.tile + i * kPitch + j;
        const double gradient =
            gradient_of_positive(problem, statistics, grad, row_weight[sample],
                                 column_weight.data(), sample, tile.column + j, *place);
        targets.push_back({place, *place, gradient, sample});
        *place = kNowhere;
      });
    }
    std::fill_n(room.of_columns, tile.columns, 0.0f);
    const bool near =
        relative_weights(rows, row_weight.data(), highest, tile.row, tile.rows, room.of_rows) &&
        (!problem.both || relative_weights(columns, column_weight.data(), highest, tile.column,
                                           tile.columns, room.of_columns));
    if (near) {
      simd::run<GradientAtOnce>(room.tile, tile, highest, room.of_rows, room.of_columns,
                                at_scale.data() + tile.row);
    } else {
      for (int64_t i = 0; i < tile.rows; ++i) {
        const int64_t sample = tile.row + i;
        float total;
        simd::run<RowGradient>(room.tile + i * kPitch, tile.columns, 1.0f, row_weight[sample],
                               rows.log_sum(sample),
                               problem.both ? column_weight.data() + tile.column : nullptr,
                               columns.from(tile.column), &total);
        at_scale[sample] += total;
      }
    }
    for (const Target& target : targets) {
      *target.place = static_cast<float>(target.gradient);
      at_scale[target.sample] += target.gradient * target.logit;
    }
    const auto add = [&](float* to, const float* matrix, int64_t by_row, int64_t by_step,
                         int64_t count, int64_t steps) {
      simd::run<products::Pack>(matrix, 1, depth, depth, steps, room.panels);
      simd::run<products::Multiply>(products::Product<float>{to, depth, /*add=*/true, scale,
                                                             room.tile, by_row, by_step,
                                                             room.panels, count, depth, steps});
    };
    add(to_rows + tile.row * depth, column_data + tile.column * depth, kPitch, 1, tile.rows,
        tile.columns);
    add(to_columns + tile.column * depth, row_data + tile.row * depth, 1, kPitch, tile.columns,
        tile.rows);
  });
  return std::accumulate(at_scale.begin(), at_scale.end(), 0.0) / problem.scale;
}

}  // namespace softmask::tiles
