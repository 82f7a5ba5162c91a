// ALBEF's momentum-distilled contrastive loss with focal weights, and its gradients, on the CPU.
//
// Keys are those of the batch and the queue, each read in place (or converted to the compute type).
// Logits of student and teacher exist for one block of rows at a time, from one product with the
// keys. A second product gives the gradient of the rows, already in the forward pass, because the
// upstream gradient only scales rows. One thread handles a row, so the number of threads changes
// the result only through BLAS, which splits its sums by it; products that the library computes
// itself (products.h) do not depend on it.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

#include "focal.h"
#include "momentum_rows.h"
#include "products.h"
#include "simd.h"

namespace softmask {
namespace {

using namespace momentum;

constexpr int64_t kBlockBytes = 24 << 20;  // of logits per block

struct Problem {
  at::Tensor query, teacher;           // [B, D]
  std::array<at::Tensor, 2> keys;      // [G, D] of the batch and [K, D] of the queue, any strides
  std::array<Positives, 2> positives;  // of each row, among each of these
  double scale, alpha;
  Focal focal;

  int64_t height() const { return query.size(0); }
  int64_t width() const { return keys[0].size(0) + keys[1].size(0); }
  double targets(int64_t sample) const {
    return static_cast<double>(positives[0].count(sample) + positives[1].count(sample));
  }
  int64_t block_rows() const {  // in blocks of nearly equal size
    const int64_t bytes = 2 * width() * query.element_size() * height();
    const int64_t blocks = std::max<int64_t>(1, (bytes + kBlockBytes - 1) / kBlockBytes);
    return std::max<int64_t>(1, (height() + blocks - 1) / blocks);
  }
};

// Where a positive's logits are stored, and the student's logit before it is overwritten.
template <typename acc_t>
struct Positive {
  acc_t *student, *teacher, logit;
};

template <typename acc_t>
std::vector<Positive<acc_t>> positives_of(const Problem& problem, const Row<acc_t>& row,
                                          int64_t sample) {
  std::vector<Positive<acc_t>> found;
  for (int part = 0; part < 2; ++part) {
    const Positives& of = problem.positives[part];
    for (int64_t k = of.first[sample]; k < of.first[sample + 1]; ++k) {
      acc_t* student = row[part].logits[0] + of.columns[k];
      found.push_back({student, row[part].logits[1] + of.columns[k], *student});
    }
  }
  return found;
}

// One row's loss for gamma = 0; replaces the student's logits with the gradient with respect to
// them.
template <typename acc_t>
double cross_entropy_row(const Problem& problem, const Row<acc_t>& row, int64_t sample) {
  const bool soft = problem.alpha > 0;
  const auto positives = positives_of(problem, row, sample);
  acc_t highest, teacher_highest, sum = 0, teacher_sum = 0, product = 0;
  if (soft) simd::run<Highest>(row, 1, &teacher_highest);
  simd::run<Highest>(row, 0, &highest);
  for (const Part<acc_t>& part : row) {
    if (soft) simd::run<TeacherExponentials>(part, teacher_highest, &teacher_sum);
    simd::run<StudentExponentials>(part, highest, soft, &sum, &product);
  }
  const acc_t y = soft ? static_cast<acc_t>(problem.alpha / teacher_sum) : acc_t(0);
  for (const Part<acc_t>& part : row) simd::run<Difference>(part, 1 / sum, y);
  const simd::LogSum<acc_t> log_sum{highest, std::log(sum)};
  const double share = (1.0 - problem.alpha) / problem.targets(sample);
  double loss = problem.alpha * log_sum.rest - double(y) * product;
  for (const Positive<acc_t>& positive : positives) {
    loss -= share * log_sum.log_probability(positive.logit);
    *positive.student -= static_cast<acc_t>(share);
  }
  return loss;
}

// The same for any gamma.
template <typename acc_t>
double focal_row(const Problem& problem, const Row<acc_t>& row, int64_t sample) {
  const auto alpha = static_cast<acc_t>(problem.alpha);
  const auto gamma = static_cast<acc_t>(problem.focal.gamma);
  const auto positives = positives_of(problem, row, sample);
  simd::LogSum<acc_t> sum, teacher_sum{};
  simd::run<LogSumExp>(row, 0, &sum);
  if (alpha > 0) simd::run<LogSumExp>(row, 1, &teacher_sum);
  double loss = 0.0, slope = 0.0;
  for (const Part<acc_t>& part : row) {
    simd::run<SoftTargets>(part, sum, teacher_sum, alpha, gamma, &loss, &slope);
    if (alpha > 0) finish_likely(problem.focal, part, &loss, &slope);
  }
  const double share = (1.0 - problem.alpha) / problem.targets(sample);
  for (const Positive<acc_t>& positive : positives) {
    const double log_p = sum.log_probability(positive.logit), h = problem.focal.slope(log_p);
    loss += share * problem.focal.loss(log_p);
    slope += share * h;
    *positive.teacher += static_cast<acc_t>(share * h);
  }
  for (const Part<acc_t>& part : row) simd::run<Gradient>(part, static_cast<acc_t>(slope));
  return loss;
}

// Products with one part of the keys, by torch's BLAS or, if the library computes them
// (products.h), by tiles of keys.
class KeyProducts {
 public:
  explicit KeyProducts(const at::Tensor& keys)
      : keys_(keys), ours_(products::are_ours(keys.scalar_type())) {}

  // Elements between rows of logits: not a power of two, at which rows would share a few cache
  // sets.
  int64_t pitch() const { return ours_ ? products::padded(size()) + products::kPanel : size(); }
  int64_t size() const { return keys_.size(0); }

  // logits [rows, size] = rows [rows, D] keys^T
  void logits(const at::Tensor& rows, at::Tensor logits) const {
    if (!ours_) {
      at::mm_out(logits, rows, keys_.t());
      return;
    }
    for_each_tile(1, [&](int64_t, const Tile& tile) {
      simd::run<products::Pack>(tile.keys, keys_.stride(0), keys_.stride(1), tile.count, depth(),
                                tile.panels);
      simd::run<products::Multiply>(products::Product<float>{
          logits.mutable_data_ptr<float>() + tile.first, logits.stride(0),
          /*add=*/false, 1.0f, rows.const_data_ptr<float>(), rows.stride(0), 1, tile.panels,
          rows.size(0), tile.count, depth()});
    });
  }

  // to [rows, D] += at_logits [rows, size] keys
  void add_gradient(const at::Tensor& at_logits, at::Tensor to) const {
    if (!ours_) {
      to.addmm_(at_logits, keys_);
      return;
    }
    const at::Tensor sums = at::zeros({kSums, to.size(0), depth()}, to.options());
    auto* data = sums.mutable_data_ptr<float>();
    for_each_tile(kSums, [&](int64_t sum, const Tile& tile) {
      simd::run<products::Pack>(tile.keys, keys_.stride(1), keys_.stride(0), depth(), tile.count,
                                tile.panels);
      simd::run<products::Multiply>(products::Product<float>{
          data + sum * to.numel(), depth(), /*add=*/true, 1.0f,
          at_logits.const_data_ptr<float>() + tile.first, at_logits.stride(0), 1, tile.panels,
          to.size(0), depth(), tile.count});
    });
    to.add_(sums.sum(0));
  }

 private:
  static constexpr int64_t kTile = 192;  // keys
  static constexpr int64_t kSums = 16;   // each by one thread, however many threads there are

  struct Tile {
    int64_t first, count;
    const float* keys;
    float* panels;  // scratch for the packed keys
  };

  int64_t depth() const { return keys_.size(1); }

  // Calls work(task, tile) on all tiles, in `tasks` tasks, each on one thread; 1 makes each tile a
  // task.
  template <typename Work>
  void for_each_tile(int64_t tasks, const Work& work) const {
    const int64_t tiles = (size() + kTile - 1) / kTile, room = kTile * products::padded(depth());
    if (tasks == 1) tasks = tiles;
    const at::Tensor memory = at::empty({at::get_num_threads(), room}, keys_.options());
    const auto* keys = keys_.const_data_ptr<float>();
    auto* rooms = memory.mutable_data_ptr<float>();
    at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t at = task * tiles / tasks; at < (task + 1) * tiles / tasks; ++at) {
          const int64_t first = at * kTile;
          work(task, Tile{first, std::min(kTile, size() - first), keys + first * keys_.stride(0),
                          rooms + at::get_thread_num() * room});
        }
      }
    });
  }

  at::Tensor keys_;
  bool ours_;
};

// Computes losses [B] and, if requested, d loss_i / d (logit_scale * query_i) [B, D].
template <typename acc_t>
void kernel(const Problem& problem, at::Tensor& losses, const OptionalTensor& gradients) {
  const int64_t count = problem.block_rows();
  const std::array<KeyProducts, 2> keys{KeyProducts(problem.keys[0]), KeyProducts(problem.keys[1])};
  const at::Tensor rows = at::empty({2 * count, problem.query.size(1)}, problem.query.options());
  const at::Tensor memory =
      at::empty({2 * count * (keys[0].pitch() + keys[1].pitch())}, problem.query.options());
  auto* loss = losses.mutable_data_ptr<acc_t>();
  for (int64_t first = 0; first < problem.height(); first += count) {
    const int64_t n = std::min(count, problem.height() - first),
                  streams = problem.alpha > 0 ? 2 : 1;
    rows.narrow(0, 0, n).copy_(problem.query.narrow(0, first, n));
    rows.narrow(0, n, n).copy_(problem.teacher.narrow(0, first, n));
    rows.mul_(problem.scale);          // the rows are fewer than their logits
    std::array<at::Tensor, 2> logits;  // [2n, keys]: the student's rows, then the teacher's
    int64_t used = 0;
    for (int part = 0; part < 2; ++part) {
      const int64_t size = 2 * n * keys[part].pitch();
      logits[part] = memory.narrow(0, used, size)
                         .view({2 * n, keys[part].pitch()})
                         .narrow(1, 0, keys[part].size());
      keys[part].logits(rows.narrow(0, 0, streams * n), logits[part].narrow(0, 0, streams * n));
      used += size;
    }
    at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Row<acc_t> row;
        for (int part = 0; part < 2; ++part) {
          const int64_t pitch = keys[part].pitch();
          auto* data = logits[part].template mutable_data_ptr<acc_t>();
          row[part] = {{data + i * pitch, data + (n + i) * pitch}, keys[part].size()};
        }
        const double row_loss = problem.focal.gamma == 0.0
                                    ? cross_entropy_row(problem, row, first + i)
                                    : focal_row(problem, row, first + i);
        loss[first + i] = static_cast<acc_t>(row_loss);
      }
    });
    if (!gradients.has_value()) continue;
    const at::Tensor gradient = gradients->narrow(0, first, n).zero_();
    for (int part = 0; part < 2; ++part) {
      if (keys[part].size() > 0) keys[part].add_gradient(logits[part].narrow(0, 0, n), gradient);
    }
  }
}

// One direction: image rows against text keys, or the reverse.
struct Direction {
  const at::Tensor &query, &teacher, &keys;
  const OptionalTensor& queue;
};

// Arguments that both directions share.
struct Options {
  double scale, alpha;
  Focal focal;
  const OptionalTensor &ids, &key_ids, &queue_ids;
  int64_t first_row;
  bool gradient;
};

std::tuple<at::Tensor, at::Tensor> one_direction(const Direction& of, const Options& options) {
  const at::ScalarType type = compute_type(of.query);
  const int64_t rows = of.query.size(0);
  const at::Tensor no_queue = at::empty({0, of.keys.size(1)}, of.keys.options());
  const Positives in_batch(rows, of.keys.size(0), options.first_row, options.ids, options.key_ids);
  const int64_t queued = of.queue.has_value() ? of.queue->size(0) : 0;
  const Positives in_queue = options.ids.has_value() && options.queue_ids.has_value()
                                 ? Positives(rows, queued, 0, options.ids, options.queue_ids)
                                 : Positives::none(rows);
  const Problem problem{of.query.to(type),
                        of.teacher.to(type),
                        {of.keys.to(type), of.queue.value_or(no_queue).to(type)},
                        {in_batch, in_queue},
                        options.scale,
                        options.alpha,
                        options.focal};
  at::Tensor losses = at::empty({rows}, of.query.options().dtype(type));
  OptionalTensor gradients;
  if (options.gradient) gradients = at::empty(of.query.sizes(), losses.options());
  AT_DISPATCH_FLOATING_TYPES(type, "momentum_contrastive",
                             [&] { kernel<scalar_t>(problem, losses, gradients); });
  return {losses, gradients.value_or(at::empty({0}, losses.options()))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> momentum_contrastive(
    const at::Tensor& image, const at::Tensor& text, const at::Tensor& image_teacher,
    const at::Tensor& text_teacher, const at::Tensor& image_keys, const at::Tensor& text_keys,
    const OptionalTensor& image_queue, const OptionalTensor& text_queue, const at::Tensor& scale,
    const at::Tensor& alpha, const at::Tensor& gamma, const OptionalTensor& ids,
    const OptionalTensor& key_ids, const OptionalTensor& queue_ids, int64_t first_row,
    bool gradient) {
  const Options options{scale.item<double>(),
                        alpha.item<double>(),
                        Focal{gamma.item<double>()},
                        ids,
                        key_ids,
                        queue_ids,
                        first_row,
                        gradient};
  const auto [of_image, image_gradients] =
      one_direction({image, image_teacher, text_keys, text_queue}, options);
  const auto [of_text, text_gradients] =
      one_direction({text, text_teacher, image_keys, image_queue}, options);
  // The backward pass sums the scale's gradient in double, so there is nothing to prepare.
  const at::Tensor at_scale = at::zeros_like(of_image);
  return {(of_image + of_text) * 0.5, at_scale, image_gradients, text_gradients};
}

// loss_i depends only on scale * image_i and scale * text_i, whose gradients the forward pass
// computed.
std::tuple<at::Tensor, at::Tensor, at::Tensor> momentum_contrastive_backward(
    const at::Tensor& grad, const at::Tensor& image, const at::Tensor& text,
    const at::Tensor& scale, const at::Tensor& at_scale, const at::Tensor& image_gradients,
    const at::Tensor& text_gradients) {
  TORCH_CHECK(image_gradients.sizes() == image.sizes() && text_gradients.sizes() == text.sizes(),
              "momentum_contrastive: the loss was computed without gradients, so there is none to "
              "go on with");
  const at::Tensor share = (grad * 0.5).unsqueeze(1);  // of each direction
  const auto of = [&](const at::Tensor& query, const at::Tensor& gradients) {
    const at::Tensor by_row = gradients * share;
    const at::Tensor by_scale = (by_row.to(at::kDouble) * query).sum();  // terms may cancel
    return std::make_pair((by_row * scale.item<double>()).to(query.scalar_type()),
                          by_scale.to(scale.scalar_type()));
  };
  const auto [image_grad, image_by_scale] = of(image, image_gradients);
  const auto [text_grad, text_by_scale] = of(text, text_gradients);
  return {image_grad, text_grad, image_by_scale + text_by_scale};
}

}  // namespace
}  // namespace softmask

TORCH_LIBRARY_IMPL(softmask, CPU, m) {
  m.impl("momentum_contrastive", &softmask::momentum_contrastive);
  m.impl("momentum_contrastive_backward", &softmask::momentum_contrastive_backward);
}
