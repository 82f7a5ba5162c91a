"""The backward kernel of focal_contrastive_loss.

A program owns a tile of rows, or of columns, and holds its gradient in registers. It loops over the tiles of the other
side, recomputes the logits and the gradient with respect to them, including all factors, and accumulates its product
with that side: four products. With ATOMIC, owners of rows also add to the columns' gradient in memory: three products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import focal
from softmask.kernels._launch import Configs, config
from softmask.kernels._math import LOG2E, exp, number
from softmask.kernels._similarity import load_features, multiply, same_ids, steepness

# By the width of features, the last for all greater widths: a gradient [BLOCK_M, width] stays in registers and, if
# RESIDENT, so do the features of its owner.
CONFIGS: dict[int, Configs] = {
    256: {
        80: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
        90: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
    },
    512: {
        80: {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
        90: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
        100: {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
    },
    1024: {80: {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 64, "RESIDENT": False, "num_warps": 8, "num_stages": 3}},
    2048: {80: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "RESIDENT": False, "num_warps": 8, "num_stages": 3}},
}
# A warpgroup's product has 64 rows, so a second one would share its elements' work; fp16's factors need its registers.
BF16: dict[int, Configs] = CONFIGS | {
    256: {80: CONFIGS[256][80], 90: CONFIGS[256][90] | {"num_warps": 4}},
}
FP32: dict[int, Configs] = {
    256: {
        80: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "RESIDENT": False, "num_warps": 8, "num_stages": 2},
        100: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "RESIDENT": False, "num_warps": 8, "num_stages": 1},
    },
    512: {80: {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 16, "RESIDENT": False, "num_warps": 8, "num_stages": 2}},
    1024: {80: {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "RESIDENT": False, "num_warps": 8, "num_stages": 2}},
}
_NARROWEST = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "RESIDENT": True, "num_warps": 4, "num_stages": 2}
_NARROW_FP32 = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, "RESIDENT": False, "num_warps": 8, "num_stages": 2}
# With ids, which need registers too, or for few samples, which should be spread over many programs.
NARROW: dict[int, Configs] = {
    32: {80: _NARROWEST, 90: _NARROWEST | {"maxnreg": 104}, 100: _NARROWEST},
    256: CONFIGS[512],
    512: {80: CONFIGS[512][80] | {"num_stages": 1}, 90: CONFIGS[512][100]},
    2048: CONFIGS[2048],
}
NARROW_FP32: dict[int, Configs] = FP32 | {
    32: {80: _NARROW_FP32, 90: _NARROW_FP32 | {"num_stages": 1}},
    64: {80: _NARROW_FP32, 100: _NARROW_FP32 | {"num_stages": 1}},
    256: {80: _NARROW_FP32},
}
# With atomics, a tile's gradient of the other side needs registers too.
WITH_ATOMICS: dict[int, Configs] = {
    512: {80: {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2}},
    2048: CONFIGS[2048],
}
INTERPRETED = {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 16}
MANY = 6400  # samples of both sides, with which 64 per program still fill a GPU


@triton.jit
def _numbers(statistics_ptr, shares_ptr, d_loss_ptr, weight, index, size, AXIS: tl.constexpr):
    """For samples `index`: both parts of the log-sum-exp, and the factors of softmax and positives in the gradient."""
    index = tl.minimum(index, size - 1)
    place_ptrs = statistics_ptr + index
    highest, rest = tl.load(place_ptrs), tl.load(place_ptrs + size)
    upstream = weight * tl.load(d_loss_ptr + index)
    at_softmax = upstream * tl.load(place_ptrs + 2 * size)
    at_positive = at_softmax
    if shares_ptr is not None:
        at_positive = upstream * tl.load(shares_ptr + index)
    return (
        tl.expand_dims(highest, AXIS), tl.expand_dims(rest, AXIS),
        tl.expand_dims(at_softmax, AXIS), tl.expand_dims(at_positive, AXIS),
    )  # fmt: skip


@triton.jit
def _probability(similarity, numbers, steep, FOLDED: tl.constexpr):
    """exp of a log-probability. FOLDED: the factor of exp multiplies numbers of rows and columns instead of
    logits, which takes registers."""
    if FOLDED:
        p = tl.exp2((steep * LOG2E) * (similarity - numbers[0]) - numbers[1] * LOG2E)
    else:
        p = exp(steep * (similarity - numbers[0]) - numbers[1])
    return p


@triton.jit
def _at_positives(similarity, same, numbers, steep, gamma):
    """What one direction's focal terms subtract from the gradient at the positives."""
    highest, rest, _, at_positive = numbers
    _, slope = focal(tl.where(same, steep * (similarity - highest) - rest, 0.0), gamma)
    return at_positive * slope


@triton.jit
def _at_softmax(similarity, own, other, steep, FOLDED: tl.constexpr):
    """What the softmax of one or both directions adds to the gradient with respect to logits [BLOCK_M, BLOCK_N], still
    without the factor scale."""
    d_similarity = tl.zeros_like(similarity)
    if own is not None:
        d_similarity += own[2] * _probability(similarity, own, steep, FOLDED)
    if other is not None:
        d_similarity += other[2] * _probability(similarity, other, steep, FOLDED)
    return d_similarity


@triton.jit
def _at_hits(similarity, same, own, other, terms, steep, gamma):
    """What the positives subtract from it. With `terms`, the focal terms of several positives, each has its own."""
    hit = tl.zeros_like(similarity)
    if own is not None:
        hit += own[3]
    if other is not None:
        hit += other[3]
    if terms:
        hit = tl.zeros_like(similarity)
        if own is not None:
            hit += _at_positives(similarity, same, own, steep, gamma)
        if other is not None:
            hit += _at_positives(similarity, same, other, steep, gamma)
    return tl.where(same, hit, 0.0)


@triton.jit
def _positives(own, other, own_ids_ptr, other_ids_ptr, sample, other_sample, shift, gamma):
    """(which samples are positives of each other, whether this tile has focal terms of several positives)."""
    if own_ids_ptr is None:
        same, terms = sample[:, None] + shift == other_sample[None, :], False
    else:
        same = same_ids(own_ids_ptr, other_ids_ptr, sample, other_sample, own[1], other[1])
        terms = gamma != 0.0
        if terms:
            terms = tl.max(same.to(tl.int32)) > 0
    return same, terms


@triton.jit
def _owner(
    own, other, own_ids_ptr, other_ids_ptr, own_statistics_ptr, other_statistics_ptr, shares_ptr, d_loss_ptr,
    weight, scale, gamma,
    d_own_ptr, d_other_ptr, d_scale_parts_ptr, tile, shift, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, GRAD_DOT: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of BLOCK_M samples of one side. Without ids, the positive of sample i is i + shift of the other side."""
    first = tile * BLOCK_M
    sample = first + tl.arange(0, BLOCK_M)
    feature = tl.arange(0, BLOCK_D)
    sign, steep = steepness(scale)
    # Comparisons of ids and IEEE products leave no registers for branches and for factors folded into numbers.
    SPARE: tl.constexpr = tl.float32 != DOT if own_ids_ptr is None else False
    if RESIDENT or d_other_ptr is not None:
        features = load_features(own, sample, feature, depth)
    own_numbers = None
    if own_statistics_ptr is not None:
        own_numbers = _numbers(own_statistics_ptr, shares_ptr, d_loss_ptr, weight, sample, own[1], 1)
    d_own = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_scale = tl.zeros([BLOCK_M], tl.float32)
    for other_first in range(0, other[1], BLOCK_N):
        other_sample = other_first + tl.arange(0, BLOCK_N)
        if RESIDENT:
            others = load_features(other, other_sample, feature, depth)
            products = tl.dot(features.to(DOT), tl.trans(others.to(DOT)), input_precision=PRECISION)
        else:
            products = multiply(own, other, sample, other_sample, depth, BLOCK_K, DOT, PRECISION)
            others = load_features(other, other_sample, feature, depth)
        similarity = sign * products
        same, terms = _positives(own, other, own_ids_ptr, other_ids_ptr, sample, other_sample, shift, gamma)
        other_numbers = None
        if other_statistics_ptr is not None:
            other_numbers = _numbers(other_statistics_ptr, shares_ptr, d_loss_ptr, weight, other_sample, other[1], 0)
        d_similarity = _at_softmax(similarity, own_numbers, other_numbers, steep, SPARE)
        live = (sample < own[1])[:, None] & (other_sample < other[1])[None, :]
        if SPARE:
            if (other_first < first + BLOCK_M + shift) & (first + shift < other_first + BLOCK_N):
                d_similarity -= _at_hits(similarity, same, own_numbers, other_numbers, terms, steep, gamma)
            if (first + BLOCK_M > own[1]) | (other_first + BLOCK_N > other[1]):
                d_similarity = tl.where(live, d_similarity, 0.0)
        else:
            d_similarity -= _at_hits(similarity, same, own_numbers, other_numbers, terms, steep, gamma)
            d_similarity = tl.where(live, d_similarity, 0.0)
        if d_scale_parts_ptr is not None:
            d_scale += tl.sum(d_similarity * similarity, 1)
        d_own = tl.dot(d_similarity.to(GRAD_DOT), others.to(GRAD_DOT), d_own, input_precision=GRAD_PRECISION)
        if d_other_ptr is not None:
            part = tl.dot(tl.trans(d_similarity.to(GRAD_DOT)), features.to(GRAD_DOT), input_precision=GRAD_PRECISION)
            place_ptrs = d_other_ptr + other_sample[:, None].to(tl.int64) * depth + feature[None, :]
            live_part = (other_sample < other[1])[:, None] & (feature < depth)[None, :]
            tl.atomic_add(place_ptrs, scale * part, mask=live_part, sem="relaxed")
    place_ptrs = d_own_ptr + sample[:, None].to(tl.int64) * depth + feature[None, :]
    tl.store(place_ptrs, scale * d_own, mask=(sample < own[1])[:, None] & (feature < depth)[None, :])
    if d_scale_parts_ptr is not None:
        tl.store(d_scale_parts_ptr + tile, sign * tl.sum(d_scale, 0))


@triton.jit
def bwd_kernel(
    rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, statistics_ptr, d_loss_ptr, scale, gamma,
    d_rows_ptr, d_columns_ptr, d_scale_parts_ptr,
    height, width, depth, first_row, stride_rn, stride_cn, BOTH: tl.constexpr, ATOMIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, GRAD_DOT: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """The first programs own rows, the others own columns."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(height, BLOCK_M)
    scale, gamma = number(scale), number(gamma)
    left, right = (rows_ptr, height, stride_rn), (columns_ptr, width, stride_cn)
    column_statistics_ptr = statistics_ptr + 3 * height if BOTH else None
    shares_ptr = None if row_ids_ptr is None else statistics_ptr + (6 if BOTH else 3) * height
    weight: tl.constexpr = 0.5 if BOTH else 1.0  # of one direction in the loss
    if tile < row_tiles:
        _owner(
            left, right, row_ids_ptr, column_ids_ptr, statistics_ptr, column_statistics_ptr, shares_ptr, d_loss_ptr,
            weight, scale, gamma,
            d_rows_ptr, d_columns_ptr if ATOMIC else None, d_scale_parts_ptr, tile, first_row, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, RESIDENT, DOT, PRECISION, GRAD_DOT, GRAD_PRECISION,
        )  # fmt: skip
    elif not ATOMIC:
        _owner(
            right, left, column_ids_ptr, row_ids_ptr, column_statistics_ptr, statistics_ptr, shares_ptr, d_loss_ptr,
            weight, scale, gamma,
            d_columns_ptr, None, None, tile - row_tiles, -first_row, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, RESIDENT, DOT, PRECISION, GRAD_DOT, GRAD_PRECISION,
        )  # fmt: skip


def backward_config(rows: Tensor, width: int, *, with_ids: bool, atomics: bool) -> dict[str, Any]:
    height, depth = rows.shape
    narrow, fp32 = with_ids or height + width < MANY, rows.dtype == torch.float32
    if fp32:
        table = NARROW_FP32 if narrow or atomics else FP32
    elif atomics:
        table = WITH_ATOMICS
    else:
        table = NARROW if narrow else BF16 if rows.dtype == torch.bfloat16 else CONFIGS
    of_width = table[min((known for known in table if known >= depth), default=max(table))]
    return config(of_width | {0: INTERPRETED | {"RESIDENT": not fp32}}, rows)
