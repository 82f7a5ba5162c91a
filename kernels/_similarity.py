"""Products of two sides' samples inside of the contrastive kernels, and what is read beside them.

A side is a tuple (features, number of samples, stride between them); neighbours of a sample's features are neighbours
in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import SMALLEST
from softmask.kernels._launch import last_contiguous


@triton.jit
def load_features(side, index, k, depth):
    """Features k of samples index: [BLOCK, BLOCK_K]. Beyond the last sample its own, beyond the last feature 0."""
    features, size, stride = side
    place = tl.minimum(index, size - 1)[:, None].to(tl.int64) * stride + k[None, :]
    return tl.load(features + place, mask=(k < depth)[None, :], other=0.0)


@triton.jit
def multiply(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Samples i of the left side times samples j of the right one: [BLOCK_M, BLOCK_N]."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a, b = load_features(left, i, k, depth), load_features(right, j, k, depth)
        total = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), total, input_precision=PRECISION)
    return total


@triton.jit
def same_ids(ids, other_ids, i, j, size, other_size):
    """Where samples i and j have one id: [BLOCK_M, BLOCK_N]."""
    own = tl.load(ids + i, mask=i < size, other=0)
    other = tl.load(other_ids + j, mask=j < other_size, other=0)
    return (own[:, None] == other[None, :]) & (i < size)[:, None] & (j < other_size)[None, :]


@triton.jit
def steepness(scale):
    """(sign, size) of a scale: logits are size * x, x = sign * product. What is scaled is x - max(x): then no fused
    multiply-add is off 0 at the maximum. Size is kept off 0, for it meets infinity."""
    size = tl.abs(scale)
    return tl.where(scale < 0.0, -1.0, 1.0), tl.where(size < SMALLEST, SMALLEST, size)


def as_read(
    rows: Tensor, columns: Tensor, row_ids: Tensor | None, column_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides as the kernels read them."""
    ids = (None, None) if row_ids is None else (row_ids.contiguous(), column_ids.contiguous())
    return last_contiguous(rows), last_contiguous(columns), *ids
