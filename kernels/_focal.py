"""The focal term of a log-probability in kernels, as in csrc/cpu/focal.h."""

from __future__ import annotations

import triton
import triton.language as tl

from softmask.kernels._math import exp

SMALLEST: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # smallest normal fp32
LIKELY: tl.constexpr = tl.constexpr(-0.5)  # log p above which 1 - p is computed by a series


@triton.jit
def _miss(log_p, p):
    """1 - p = -expm1(log p), precise also near p = 1; kept above 0, where gamma in (0, 1) has no derivative."""
    near = tl.maximum(log_p, LIKELY)
    series = 1.0 + near * (1.0 / 8.0)
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + near * (1.0 / n) * series
    return tl.maximum(tl.where(log_p > LIKELY, -near * series, 1.0 - p), SMALLEST)


@triton.jit
def focal(log_p, gamma):
    """(-(1 - p)^gamma log p, h(p) = (1 - p)^gamma - gamma p (1 - p)^(gamma - 1) log p), of any shape.

    gamma = 0 gives exactly (-log p, 1). log p must be finite; values that rounding puts above 0 count as 0.
    """
    log_p = tl.where(log_p > 0.0, 0.0, log_p)
    p = exp(log_p)
    miss = _miss(log_p, p)
    power = tl.exp2(gamma * tl.log2(miss))
    return -power * log_p, power - gamma * p * (power / miss) * log_p
