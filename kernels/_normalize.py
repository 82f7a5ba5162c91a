"""Normalization of maps in kernels, and its gradient: as reference.normalize_map, with "none" for None."""

from __future__ import annotations

import triton
import triton.language as tl

EPS: tl.constexpr = tl.constexpr(1e-7)  # reference.NORMALIZE_EPS


@triton.jit
def extent(c, live, NORMALIZE: tl.constexpr):
    """(low, divisor): a map c [BLOCK] becomes (c - low) / divisor. Elements that are not live do not count."""
    low, divisor = 0.0, 1.0
    if NORMALIZE == "minmax":
        low = tl.min(tl.where(live, c, float("inf")), 0)
    if NORMALIZE == "minmax" or NORMALIZE == "max":
        divisor = tl.max(tl.where(live, c, float("-inf")), 0) - low + EPS
        broken = tl.max((live & (c != c)).to(tl.int32), 0)  # unlike torch's, these maxima ignore NaN
        divisor = tl.where(broken > 0, float("nan"), divisor)
    if NORMALIZE == "sum":
        divisor = tl.sum(tl.where(live, c, 0.0), 0) + EPS
    return low, divisor


@triton.jit
def gradient(grad, c, live, NORMALIZE: tl.constexpr):
    """Turns the gradient of a normalized map, [BLOCK], into that of the map c; tied elements share evenly."""
    grad = tl.where(live, grad, 0.0)
    low, divisor = extent(c, live, NORMALIZE)
    out = grad / divisor
    if NORMALIZE != "none":
        at_divisor = -tl.sum(grad * tl.where(live, (c - low) / divisor, 0.0), 0) / divisor
        if NORMALIZE == "sum":
            out += at_divisor
        else:
            highest = live & (c == tl.max(tl.where(live, c, float("-inf")), 0))
            out += tl.where(highest, at_divisor / tl.sum(highest.to(tl.float32), 0), 0.0)
        if NORMALIZE == "minmax":
            lowest = live & (c == low)
            at_low = -tl.sum(grad, 0) / divisor - at_divisor
            out += tl.where(lowest, at_low / tl.sum(lowest.to(tl.float32), 0), 0.0)
    return out
