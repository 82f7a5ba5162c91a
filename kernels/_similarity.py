"""Products of two sides' samples in the contrastive kernels, and what is loaded along with them.

A side is a tuple (features, number of samples, stride between samples); the features of a sample are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import SMALLEST
from softmask.kernels._launch import last_contiguous


@triton.jit
def load_features(side, index, feature, depth):
    """Features of samples `index`: [BLOCK, BLOCK_K]. Beyond the last sample, its features repeat; beyond the last
    feature, they are 0."""
    features_ptr, size, stride = side
    place = tl.minimum(index, size - 1)[:, None].to(tl.int64) * stride + feature[None, :]
    return tl.load(features_ptr + place, mask=(feature < depth)[None, :], other=0.0)


@triton.jit
def multiply(left, right, row, column, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Products of samples `row` of the left side and `column` of the right side: [BLOCK_M, BLOCK_N]."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        feature = start + tl.arange(0, BLOCK_K)
        left_tile, right_tile = load_features(left, row, feature, depth), load_features(right, column, feature, depth)
        total = tl.dot(left_tile.to(DOT), tl.trans(right_tile.to(DOT)), total, input_precision=PRECISION)
    return total


@triton.jit
def same_ids(ids_ptr, other_ids_ptr, row, column, size, other_size):
    """Where two samples have the same id: [BLOCK_M, BLOCK_N]."""
    own = tl.load(ids_ptr + row, mask=row < size, other=0)
    other = tl.load(other_ids_ptr + column, mask=column < other_size, other=0)
    return (own[:, None] == other[None, :]) & (row < size)[:, None] & (column < other_size)[None, :]


@triton.jit
def steepness(scale):
    """(sign, size) of a scale: logits are size * x with x = sign * product. Kernels scale x - max(x), so that even a
    fused multiply-add gives exactly 0 at the maximum. size is kept above 0, because it multiplies infinity."""
    size = tl.abs(scale)
    return tl.where(scale < 0.0, -1.0, 1.0), tl.where(size < SMALLEST, SMALLEST, size)


def as_read(
    rows: Tensor, columns: Tensor, row_ids: Tensor | None, column_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides as the kernels read them."""
    ids = (None, None) if row_ids is None else (row_ids.contiguous(), column_ids.contiguous())
    return last_contiguous(rows), last_contiguous(columns), *ids
