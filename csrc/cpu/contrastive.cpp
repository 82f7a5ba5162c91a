// Symmetric InfoNCE with focal weights and shared positives, and its gradients, on the CPU.
//
// Logits exist for one block of rows at a time: torch's BLAS computes them, and they are consumed
// in the cache. This takes one product in the forward pass and three in the backward pass (the
// block again, and its product with each side). A few numbers per row are kept between the passes.
// One thread handles a row, or a column, block after block, so the number of threads changes the
// result only through BLAS, which splits its sums by it. If the library computes its own products
// (products.h) and there are enough tiles for all threads, contrastive_tiles.h is used instead.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "contrastive_problem.h"
#include "contrastive_tiles.h"
#include "focal.h"
#include "simd.h"

namespace softmask {
namespace {

constexpr int64_t kBlockBytes = 8 << 20;  // of logits per block
constexpr int64_t kColumns = 1024;        // at a time, so that their sums stay in the cache

// Turns a row of products into logits, in place, and computes their log-sum-exp.
struct RowLogSumExp {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(acc_t* row, int64_t size, acc_t scale, simd::LogSum<acc_t>* sum) {
    for (int64_t j = 0; j < size; ++j) row[j] *= scale;
    *sum = simd::log_sum_exp<Bytes>(row, size);
  }
};

// Adds a block of logits to the running maximum and the running sum of exponentials of `size`
// columns.
struct ColumnSums {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const acc_t* block, int64_t rows, int64_t stride, acc_t* highest,
                                  acc_t* sums, int64_t size) {
    constexpr int kLanes = simd::kLanesOf<acc_t, Bytes>;
    constexpr acc_t kLowest = simd::kLowest<acc_t>;
    acc_t before[kColumns], fresh[kColumns] = {};  // short sums, per block, are more precise
    std::copy_n(highest, size, before);
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t* row = block + i * stride;
      for (int64_t j = 0; j < size; ++j) highest[j] = row[j] > highest[j] ? row[j] : highest[j];
    }
    for (int64_t i = 0; i < rows; ++i) {
      const acc_t* row = block + i * stride;
      for (int64_t j = 0; j < size; j += kLanes) {
        const auto z = simd::load_some<Bytes>(row + j, size - j, kLowest);
        const auto top = simd::load_some<Bytes>(highest + j, size - j, acc_t(0));
        const auto sum = simd::load_some<Bytes>(fresh + j, size - j, acc_t(0));
        simd::store_some(fresh + j, sum + simd::exp_nonpositive(z - top), size - j);
      }
    }
    for (int64_t j = 0; j < size; j += kLanes) {
      const auto shrink = simd::load_some<Bytes>(before + j, size - j, kLowest) -
                          simd::load_some<Bytes>(highest + j, size - j, acc_t(0));
      const auto sum = simd::load_some<Bytes>(sums + j, size - j, acc_t(0));
      const auto added = simd::load_some<Bytes>(fresh + j, size - j, acc_t(0));
      simd::store_some(sums + j, sum * simd::exp_nonpositive(shrink) + added, size - j);
    }
  }
};

at::Tensor empty_block(const Problem& problem) {
  const int64_t row_bytes = std::max<int64_t>(1, problem.width() * problem.rows.element_size());
  const int64_t count =
      std::clamp<int64_t>(kBlockBytes / row_bytes, 16, std::max<int64_t>(16, problem.height()));
  return at::empty({count, problem.width()}, problem.rows.options());
}

// Calls work(block, first, count) on the blocks of rows, in order.
template <typename Work>
void for_each_block(const Problem& problem, const Work& work) {
  const at::Tensor memory = empty_block(problem), columns = problem.columns.t();
  for (int64_t first = 0; first < problem.height(); first += memory.size(0)) {
    const int64_t count = std::min(memory.size(0), problem.height() - first);
    at::Tensor block = memory.narrow(0, 0, count);
    at::mm_out(block, problem.rows.narrow(0, first, count), columns);
    work(block, first, count);
  }
}

// Computes the loss and slope of each row, and stores the logits of the positives if the columns
// need them.
template <typename acc_t>
void finish_rows(const Problem& problem, const Statistics<acc_t>& statistics, acc_t* block,
                 int64_t first, int64_t count, acc_t* logits, double* loss) {
  const Positives& positives = problem.positives;
  const int64_t width = problem.width();
  const auto scale = static_cast<acc_t>(problem.scale);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      acc_t* row = block + i * width;
      simd::LogSum<acc_t> sum;
      simd::run<RowLogSumExp>(row, width, scale, &sum);
      const int64_t sample = first + i;
      double total = 0.0, slope = 0.0;
      for (int64_t k = positives.first[sample]; k < positives.first[sample + 1]; ++k) {
        const acc_t logit = row[positives.columns[k]];
        total += problem.focal.loss(sum.log_probability(logit));
        slope += problem.focal.slope(sum.log_probability(logit));
        if (problem.both) logits[k] = logit;
      }
      const auto targets = static_cast<double>(positives.count(sample));
      loss[sample] = problem.share() * total / targets;
      statistics.rows.highest[sample] = sum.highest;
      statistics.rows.rest[sample] = sum.rest;
      statistics.rows.slope[sample] = static_cast<acc_t>(slope / targets);
    }
  });
}

template <typename acc_t>
void finish_columns(const Problem& problem, const Side<acc_t>& columns, const acc_t* logits,
                    double* loss) {
  const Positives& positives = problem.positives;
  std::vector<double> slope(problem.width());
  for (int64_t i = 0; i < problem.height(); ++i) {
    for (int64_t k = positives.first[i]; k < positives.first[i + 1]; ++k) {
      const int64_t j = positives.columns[k];
      const double log_p = columns.log_sum(j).log_probability(logits[k]);
      const auto targets = static_cast<double>(positives.count(j));
      loss[j] += problem.share() * problem.focal.loss(log_p) / targets;
      slope[j] += problem.focal.slope(log_p) / targets;
    }
  }
  std::copy_n(slope.begin(), slope.size(), columns.slope);
}

// The forward pass by tiles: log-sum-exps first, then losses and slopes.
void tiled_forward(const Problem& problem, at::Tensor& loss, const at::Tensor& memory) {
  const Statistics<float> statistics(problem, memory);
  const Positives& positives = problem.positives;
  std::vector<float> logits(positives.columns.size());
  std::vector<double> losses(problem.height());
  tiles::log_sums(problem, statistics, logits.data());
  for (int64_t i = 0; i < problem.height(); ++i) {
    const simd::LogSum<float> sum = statistics.rows.log_sum(i);
    double total = 0.0, slope = 0.0;
    for (int64_t k = positives.first[i]; k < positives.first[i + 1]; ++k) {
      total += problem.focal.loss(sum.log_probability(logits[k]));
      slope += problem.focal.slope(sum.log_probability(logits[k]));
    }
    const auto targets = static_cast<double>(positives.count(i));
    losses[i] = problem.share() * total / targets;
    statistics.rows.slope[i] = static_cast<float>(slope / targets);
  }
  if (problem.both) finish_columns(problem, statistics.columns, logits.data(), losses.data());
  std::copy(losses.begin(), losses.end(), loss.mutable_data_ptr<float>());
}

template <typename acc_t>
void forward_kernel(const Problem& problem, at::Tensor& loss, const at::Tensor& memory) {
  const Statistics<acc_t> statistics(problem, memory);
  const int64_t width = problem.width(), in_columns = problem.both ? width : 0;
  acc_t* highest = statistics.columns.highest;
  std::fill_n(highest, in_columns, simd::kLowest<acc_t>);
  std::vector<acc_t> sums(in_columns);
  std::vector<acc_t> logits(problem.both ? problem.positives.columns.size() : 0);
  std::vector<double> losses(problem.height());
  for_each_block(problem, [&](const at::Tensor& block, int64_t first, int64_t count) {
    auto* data = block.mutable_data_ptr<acc_t>();
    finish_rows(problem, statistics, data, first, count, logits.data(), losses.data());
    at::parallel_for(0, in_columns, kColumns, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j += kColumns) {
        simd::run<ColumnSums>(data + j, count, width, highest + j, &sums[j],
                              std::min(kColumns, end - j));
      }
    });
  });
  if (problem.both) {
    for (int64_t j = 0; j < width; ++j) statistics.columns.rest[j] = std::log(sums[j]);
    finish_columns(problem, statistics.columns, logits.data(), losses.data());
  }
  std::copy(losses.begin(), losses.end(), loss.mutable_data_ptr<acc_t>());
}

// Turns a block of products into the gradient with respect to the logits; at_scale[i] is row i's
// share of the scale's gradient.
template <typename acc_t>
void block_gradient(const Problem& problem, const Statistics<acc_t>& statistics, const acc_t* grad,
                    const std::vector<acc_t>& column_weight, acc_t* block, int64_t first,
                    int64_t count, double* at_scale) {
  const Positives& positives = problem.positives;
  const int64_t width = problem.width();
  const double share = problem.share();
  const auto scale = static_cast<acc_t>(problem.scale);
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<std::pair<acc_t, double>> targets;  // product and gradient of each positive
    for (int64_t i = begin; i < end; ++i) {
      acc_t *row = block + i * width, total;
      const int64_t sample = first + i;
      const auto weight = static_cast<acc_t>(share * grad[sample] * statistics.rows.slope[sample]);
      targets.clear();
      for (int64_t k = positives.first[sample]; k < positives.first[sample + 1]; ++k) {
        const int64_t j = positives.columns[k];
        const acc_t product = std::exchange(row[j], kNowhere);
        targets.emplace_back(
            product, gradient_of_positive(problem, statistics, grad, weight, column_weight.data(),
                                          sample, j, scale * product));
      }
      simd::run<RowGradient>(row, width, scale, weight, statistics.rows.log_sum(sample),
                             problem.both ? column_weight.data() : nullptr, statistics.columns,
                             &total);
      at_scale[sample] = total;
      for (size_t k = 0; k < targets.size(); ++k) {
        const auto [product, gradient] = targets[k];
        row[positives.columns[positives.first[sample] + k]] = static_cast<acc_t>(gradient);
        at_scale[sample] += gradient * product;
      }
    }
  });
}

template <typename acc_t>
double backward_kernel(const Problem& problem, const at::Tensor& grad, const at::Tensor& memory,
                       const at::Tensor& rows_grad, const at::Tensor& columns_grad) {
  const Statistics<acc_t> statistics(problem, memory);
  const auto* upstream = grad.const_data_ptr<acc_t>();
  std::vector<acc_t> column_weight(problem.both ? problem.width() : 0);
  for (size_t j = 0; j < column_weight.size(); ++j) {
    column_weight[j] =
        static_cast<acc_t>(problem.share() * upstream[j] * statistics.columns.slope[j]);
  }
  std::vector<double> at_scale(problem.height());
  for_each_block(problem, [&](const at::Tensor& block, int64_t first, int64_t count) {
    auto* data = block.mutable_data_ptr<acc_t>();
    block_gradient(problem, statistics, upstream, column_weight, data, first, count,
                   at_scale.data());
    at::Tensor rows = rows_grad.narrow(0, first, count), columns = columns_grad;
    at::addmm_out(rows, rows, block, problem.columns, /*beta=*/0, /*alpha=*/problem.scale);
    at::addmm_out(columns, columns, block.t(), problem.rows.narrow(0, first, count),
                  /*beta=*/first > 0 ? 1 : 0, /*alpha=*/problem.scale);
  });
  return std::accumulate(at_scale.begin(), at_scale.end(), 0.0);
}

std::tuple<at::Tensor, at::Tensor> contrastive(const at::Tensor& rows, const at::Tensor& columns,
                                               const at::Tensor& scale, const at::Tensor& gamma,
                                               const OptionalTensor& row_ids,
                                               const OptionalTensor& column_ids, int64_t first_row,
                                               bool both) {
  const Problem problem(rows, columns, scale, gamma, row_ids, column_ids, first_row, both);
  at::Tensor loss = at::empty({rows.size(0)}, problem.rows.options()), memory = at::Tensor();
  AT_DISPATCH_FLOATING_TYPES(problem.rows.scalar_type(), "contrastive", [&] {
    memory = Statistics<scalar_t>::empty(problem);
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (tiles::are_worth_it(problem)) return tiled_forward(problem, loss, memory);
    }
    forward_kernel<scalar_t>(problem, loss, memory);
  });
  return {loss, memory};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> contrastive_backward(
    const at::Tensor& grad, const at::Tensor& statistics, const at::Tensor& rows,
    const at::Tensor& columns, const at::Tensor& scale, const at::Tensor& gamma,
    const OptionalTensor& row_ids, const OptionalTensor& column_ids, int64_t first_row, bool both) {
  const Problem problem(rows, columns, scale, gamma, row_ids, column_ids, first_row, both);
  const at::Tensor rows_grad = at::empty_like(problem.rows);
  const at::Tensor columns_grad =
      problem.height() > 0 ? at::empty_like(problem.columns) : at::zeros_like(problem.columns);
  double at_scale = 0.0;
  AT_DISPATCH_FLOATING_TYPES(problem.rows.scalar_type(), "contrastive_backward", [&] {
    const at::Tensor upstream = grad.contiguous();
    if constexpr (std::is_same_v<scalar_t, float>) {
      if (tiles::are_worth_it(problem)) {
        at_scale = tiles::gradients(problem, Statistics<float>(problem, statistics),
                                    upstream.const_data_ptr<float>(), rows_grad, columns_grad);
        return;
      }
    }
    at_scale = backward_kernel<scalar_t>(problem, upstream, statistics, rows_grad, columns_grad);
  });
  return {rows_grad.to(rows.scalar_type()), columns_grad.to(columns.scalar_type()),
          at::scalar_tensor(at_scale, scale.options())};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("contrastive", &softmask::contrastive);
  m.impl("contrastive_backward", &softmask::contrastive_backward);
}
