// Single passes over a row's logits in the momentum-distilled contrastive loss: sums of
// exponentials, sums over soft targets, gradients with respect to the logits.

#pragma once

#include <ATen/ATen.h>

#include <array>

#include "focal.h"
#include "simd.h"

namespace softmask::momentum {

constexpr float kLikely = 0.25f;  // larger probabilities are few, and computed in double

// logits[0] are the student's, logits[1] the teacher's.
template <typename acc_t>
struct Part {
  acc_t* logits[2];
  int64_t size;
};

template <typename acc_t>
using Row = std::array<Part<acc_t>, 2>;  // a row's logits for the batch's keys and the queue

// Log-sum-exp of a row's logits over both parts.
struct LogSumExp {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Row<acc_t>& row, int which, simd::LogSum<acc_t>* sum) {
    simd::LogSum<acc_t> parts[2];
    acc_t total = 0;
    for (int part = 0; part < 2; ++part) {
      parts[part] = simd::log_sum_exp<Bytes>(row[part].logits[which], row[part].size);
    }
    sum->highest = std::max(parts[0].highest, parts[1].highest);
    for (const auto& part : parts) total += std::exp(part.highest - sum->highest + part.rest);
    sum->rest = std::log(total);
  }
};

// log(1 - p) for 0 <= p <= kLikely, by its Taylor series.
template <typename V>
SOFTMASK_INLINE V log_of_miss(const V& p) {
  constexpr int kTerms = sizeof(p[0]) == 8 ? 24 : 11;
  V sum = V{} + 1 / static_cast<std::decay_t<decltype(p[0])>>(kTerms);
  for (int n = kTerms - 1; n > 0; --n)
    sum = sum * p + 1 / static_cast<std::decay_t<decltype(p[0])>>(n);
  return -p * sum;
}

// For gamma = 0, where two exponentials per key suffice. Replaces the student's logits with e^(z -
// highest); adds their sum, and the sum of (z - highest) times the teacher's exponentials.
struct StudentExponentials {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Part<acc_t>& part, acc_t highest, bool soft, acc_t* sum,
                                  acc_t* product) {
    using V = simd::Vector<acc_t, Bytes>;
    V sums{}, products{};
    for (int64_t j = 0; j < part.size; j += simd::kLanesOf<acc_t, Bytes>) {
      const int64_t left = part.size - j;
      const V z = simd::load_some<Bytes>(part.logits[0] + j, left, simd::kLowest<acc_t>) - highest;
      const V e = simd::exp_nonpositive(z);
      sums += e;
      if (soft) {
        const V y = simd::load_some<Bytes>(part.logits[1] + j, left, acc_t(0));
        products += y > 0 ? y * z : V{};  // z may be infinite where y = 0
      }
      simd::store_some(part.logits[0] + j, e, left);
    }
    *sum += simd::sum_lanes(sums);
    *product += simd::sum_lanes(products);
  }
};

struct Highest {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Row<acc_t>& row, int which, acc_t* highest) {
    *highest = simd::kLowest<acc_t>;
    for (const Part<acc_t>& part : row) {
      *highest = std::max(*highest, simd::max<Bytes>(part.logits[which], part.size));
    }
  }
};

struct TeacherExponentials {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Part<acc_t>& part, acc_t highest, acc_t* sum) {
    *sum += simd::exponentials<Bytes>(part.logits[1], highest, part.size);
  }
};

// Replaces the student's exponentials with the gradient with respect to the logits, share * student
// - y * teacher.
struct Difference {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Part<acc_t>& part, acc_t share, acc_t y) {
    acc_t* student = part.logits[0];
    const acc_t* teacher = part.logits[1];
    for (int64_t j = 0; j < part.size; ++j) {
      student[j] = y != 0 ? student[j] * share - teacher[j] * y : student[j] * share;
    }
  }
};

// For other gammas: sums over the soft targets. Keeps what the gradient needs: p in place of the
// student's logits, y h(p) in place of the teacher's. Keys whose p is above kLikely are left to
// `finish_likely`.
struct SoftTargets {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Part<acc_t>& part, const simd::LogSum<acc_t>& sum,
                                  const simd::LogSum<acc_t>& teacher_sum, acc_t alpha, acc_t gamma,
                                  double* loss, double* slope) {
    using V = simd::Vector<acc_t, Bytes>;
    const V likely = V{} + acc_t(kLikely);
    V losses{}, slopes{};
    for (int64_t j = 0; j < part.size; j += simd::kLanesOf<acc_t, Bytes>) {
      const int64_t left = part.size - j;
      const V z = simd::load_some<Bytes>(part.logits[0] + j, left, simd::kLowest<acc_t>);
      const V given = z - sum.highest - sum.rest;
      V y{};
      if (alpha > 0) {
        const V t = simd::load_some<Bytes>(part.logits[1] + j, left, simd::kLowest<acc_t>);
        y = simd::exp_nonpositive(t - teacher_sum.highest - teacher_sum.rest) * alpha;
      }
      const V p = simd::exp_nonpositive(given), bounded = p > likely ? V{} : p;
      const V log_p = y > 0 ? given : V{};  // may be infinite where y = 0
      const V power = simd::exp_nonpositive(gamma * log_of_miss(bounded));
      const V h = power - gamma * bounded * (power / (1 - bounded)) * log_p;
      losses -= p > likely ? V{} : power * y * log_p;
      slopes += p > likely ? V{} : h * y;
      simd::store_some(part.logits[0] + j, p, left);
      simd::store_some(part.logits[1] + j, p > likely ? y : h * y, left);
    }
    *loss += simd::sum_lanes(losses);
    *slope += simd::sum_lanes(slopes);
  }
};

// Adds the keys that SoftTargets left out.
template <typename acc_t>
void finish_likely(const Focal& focal, const Part<acc_t>& part, double* loss, double* slope) {
  for (int64_t j = 0; j < part.size; ++j) {
    if (!(part.logits[0][j] > acc_t(kLikely))) continue;
    const double log_p = std::log(double(part.logits[0][j])), y = part.logits[1][j],
                 h = focal.slope(log_p);
    *loss += y * focal.loss(log_p);
    *slope += y * h;
    part.logits[1][j] = static_cast<acc_t>(y * h);
  }
}

// Replaces p with the gradient with respect to the logits, p * slope - y h(p).
struct Gradient {
  template <int Bytes, typename acc_t>
  static SOFTMASK_INLINE void run(const Part<acc_t>& part, acc_t slope) {
    acc_t* p = part.logits[0];
    const acc_t* at_logit = part.logits[1];
    for (int64_t j = 0; j < part.size; ++j) p[j] = p[j] * slope - at_logit[j];
  }
};

}  // namespace softmask::momentum
