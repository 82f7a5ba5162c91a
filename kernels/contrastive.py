"""focal_contrastive_loss: logits exist one tile at a time, and only their sums per row and per column are stored.

Forward, a program multiplies one tile of rows with one tile of columns and writes the tile's share of every row's and
every column's log-sum-exp; a second launch joins the shares of a sample, in fixed order, and takes its loss. Positives
come from the tiles too. Where several share a row and gamma is not 0, the second launch multiplies again the tiles that
hold positives. Backward is one launch: a program owns a tile of rows, or of columns, goes through the tiles of the
other side, makes the gradient at the logits again and adds up its product with that side: five products in all, bits
that repeat. With SOFTMASK_ATOMICS=1 the owners of rows add to the columns' gradient as well: four, bits that do not.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import SMALLEST, focal
from softmask.kernels._launch import Configs, config, dots, last_contiguous, launch

ATOMICS = os.environ.get("SOFTMASK_ATOMICS", "0") not in ("", "0")
GROUP: tl.constexpr = tl.constexpr(8)  # row tiles that neighbouring programs share columns for, in the cache
JOINED: tl.constexpr = tl.constexpr(32)  # tiles whose sums are joined at a time
LOWEST: tl.constexpr = tl.constexpr(-3e38)  # a maximum of nothing, from which infinity can be subtracted

TILES: Configs = {
    0: {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128},
    80: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}
FINISH: Configs = {
    0: {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128},
    80: {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
}
BACKWARD: Configs = {
    0: {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 128, "RESIDENT": True},
    80: {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "RESIDENT": True, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def _load(side, index, k, depth):
    """Samples index of a side (features, samples, stride between them): [BLOCK, BLOCK_K], 0 beyond the edges."""
    features, size, stride = side
    place = index[:, None].to(tl.int64) * stride + k[None, :]
    return tl.load(features + place, mask=(index < size)[:, None] & (k < depth)[None, :], other=0.0)


@triton.jit
def _products(left, right, i, j, depth, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Samples i of the left side times samples j of the right one: [BLOCK_M, BLOCK_N]."""
    total = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a, b = _load(left, i, k, depth), _load(right, j, k, depth)
        total = tl.dot(a.to(DOT), tl.trans(b.to(DOT)), total, input_precision=PRECISION)
    return total


@triton.jit
def _same(ids, other_ids, i, j, size, other_size):
    """Where samples i and j have one id: [BLOCK_M, BLOCK_N]."""
    own = tl.load(ids + i, mask=i < size, other=0)
    other = tl.load(other_ids + j, mask=j < other_size, other=0)
    return (own[:, None] == other[None, :]) & (i < size)[:, None] & (j < other_size)[None, :]


@triton.jit
def _slope(scale):
    """(sign, size) of scale: logits are size * x, x = sign * product. Where x - max(x) is what is scaled, a product that
    the compiler fuses with its sum cannot be off at the maximum. Size is kept off 0: it meets infinity."""
    scale = tl.load(scale).to(tl.float32)
    size = tl.abs(scale)
    return tl.where(scale < 0.0, -1.0, 1.0), tl.where(size < SMALLEST, SMALLEST, size)


@triton.jit
def _store_sums(sums, x, same, steep, tile, index, size, AXIS: tl.constexpr, NUMBERS: tl.constexpr):
    """A tile's part of the sums of its rows (AXIS 1) or columns (AXIS 0), sums [tiles, NUMBERS, size]: the maximum, the
    sum of exponentials under it, with ids also the sum and the number of the positive logits."""
    place = sums + tile.to(tl.int64) * (NUMBERS * size) + index
    live = index < size
    highest = tl.maximum(tl.max(x, AXIS), LOWEST)
    tl.store(place, highest, mask=live)
    tl.store(place + size, tl.sum(tl.exp(steep * (x - tl.expand_dims(highest, AXIS))), AXIS), mask=live)
    if NUMBERS == 4:
        tl.store(place + 2 * size, tl.sum(tl.where(same, x, 0.0), AXIS), mask=live)
        tl.store(place + 3 * size, tl.sum(same.to(tl.float32), AXIS), mask=live)


@triton.jit
def _tiles(
    rows, columns, row_ids, column_ids, scale, row_sums, column_sums, positives,
    height, width, depth, first_row, row_stride, column_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of one tile, and without ids the logits of the positives in it."""
    row_tiles, column_tiles = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    m, n = tl.swizzle2d(program // column_tiles, program % column_tiles, row_tiles, column_tiles, GROUP)
    i, j = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = (rows, height, row_stride), (columns, width, column_stride)
    sign, steep = _slope(scale)
    x = sign * _products(left, right, i, j, depth, BLOCK_K, DOT, PRECISION)
    x = tl.where((i < height)[:, None] & (j < width)[None, :], x, float("-inf"))
    same = None
    if row_ids is not None:
        same = _same(row_ids, column_ids, i, j, height, width)
    elif (n * BLOCK_N < (m + 1) * BLOCK_M + first_row) & (m * BLOCK_M + first_row < (n + 1) * BLOCK_N):
        positive = i + first_row
        logit = tl.sum(tl.where(j[None, :] == positive[:, None], x, 0.0), 1)
        tl.store(positives + i, logit, mask=(i < height) & (positive // BLOCK_N == n))
    NUMBERS: tl.constexpr = 2 if row_ids is None else 4
    _store_sums(row_sums, x, same, steep, n, i, height, 1, NUMBERS)
    if column_sums is not None:
        _store_sums(column_sums, x, same, steep, m, j, width, 0, NUMBERS)


@triton.jit
def _join(sums, steep, tiles, index, size, NUMBERS: tl.constexpr):
    """The sums of samples index over all tiles: maximum, log of the sum of exponentials, and of the positive logits."""
    highest = tl.full([index.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([index.shape[0]], tl.float32)
    hits, count = total, total
    for start in range(0, tiles, JOINED):
        tile = start + tl.arange(0, JOINED)
        place = sums + tile[:, None].to(tl.int64) * (NUMBERS * size) + index[None, :]
        live = (tile < tiles)[:, None]
        tops = tl.load(place, mask=live, other=LOWEST)  # [JOINED, BLOCK_M]
        before, highest = highest, tl.maximum(highest, tl.max(tops, 0))
        part = tl.load(place + size, mask=live, other=0.0) * tl.exp(steep * (tops - highest[None, :]))
        total = total * tl.exp(steep * (before - highest)) + tl.sum(part, 0)
        if NUMBERS == 4:
            hits += tl.sum(tl.load(place + 2 * size, mask=live, other=0.0), 0)
            count += tl.sum(tl.load(place + 3 * size, mask=live, other=0.0), 0)
    return highest, tl.log(total), hits, count


@triton.jit
def _over_positives(
    own, other, own_ids, other_ids, m, highest, rest, sign, steep, gamma, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the focal terms, and of their slopes, over the positives of the samples from m on: products of the tiles
    that have any."""
    i = m + tl.arange(0, BLOCK_M)
    loss = tl.zeros([BLOCK_M], tl.float32)
    slope = loss
    for n in range(0, other[1], BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        same = _same(own_ids, other_ids, i, j, own[1], other[1])
        if tl.max(same.to(tl.int32)) > 0:
            x = sign * _products(own, other, i, j, depth, BLOCK_K, DOT, PRECISION)
            log_p = steep * (x - highest[:, None]) - rest[:, None]
            losses, slopes = focal(tl.where(same, log_p, 0.0), gamma)
            loss += tl.sum(tl.where(same, losses, 0.0), 1)
            slope += tl.sum(tl.where(same, slopes, 0.0), 1)
    return loss, slope


@triton.jit
def _direction(
    own, other, own_ids, other_ids, sums, tiles, positives, statistics, m, sign, steep, gamma, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One direction's loss of the samples from m on, and their number of positives; writes its three statistics."""
    size = own[1]
    i = m + tl.arange(0, BLOCK_M)
    index = tl.minimum(i, size - 1)
    highest, rest, hits, count = _join(sums, steep, tiles, index, size, 2 if own_ids is None else 4)
    if own_ids is None:
        positive = tl.load(positives + index)
    else:
        positive = hits / count
    loss, slope = focal(steep * (positive - highest) - rest, gamma)
    if own_ids is not None:
        if gamma != 0.0:  # no function of the mean logit then
            loss, slope = _over_positives(
                own, other, own_ids, other_ids, m, highest, rest, sign, steep, gamma, depth,
                BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
            loss, slope = loss / count, slope / count
    live = i < size
    tl.store(statistics + i, highest, mask=live)
    tl.store(statistics + size + i, rest, mask=live)
    tl.store(statistics + 2 * size + i, slope, mask=live)
    return loss, count


@triton.jit
def _finish(
    rows, columns, row_ids, column_ids, scale, gamma, row_sums, column_sums, positives, loss, statistics,
    height, width, depth, row_stride, column_stride, row_tiles, column_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of BLOCK_M samples."""
    m = tl.program_id(0) * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    sign, steep = _slope(scale)
    gamma = tl.load(gamma).to(tl.float32)
    left, right = (rows, height, row_stride), (columns, width, column_stride)
    total, count = _direction(
        left, right, row_ids, column_ids, row_sums, column_tiles, positives, statistics, m, sign, steep, gamma, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    shares = statistics + 3 * height
    if column_sums is not None:
        by_column, _ = _direction(
            right, left, column_ids, row_ids, column_sums, row_tiles, positives, shares, m, sign, steep, gamma, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        total = 0.5 * (total + by_column)
        shares += 3 * height
    tl.store(loss + i, total, mask=i < height)
    if row_ids is not None:
        tl.store(shares + i, 1.0 / count, mask=i < height)


@triton.jit
def _numbers(statistics, shares, grad, weight, index, size, AXIS: tl.constexpr):
    """Of samples index: both parts of the log-sum-exp, and the factors of softmax and positives in the gradient."""
    live = index < size
    place = statistics + index
    highest, rest = tl.load(place, mask=live, other=0.0), tl.load(place + size, mask=live, other=0.0)
    upstream = weight * tl.load(grad + index, mask=live, other=0.0)
    at_softmax = upstream * tl.load(place + 2 * size, mask=live, other=0.0)
    at_positive = at_softmax
    if shares is not None:
        at_positive = upstream * tl.load(shares + index, mask=live, other=0.0)
    return (
        tl.expand_dims(highest, AXIS), tl.expand_dims(rest, AXIS),
        tl.expand_dims(at_softmax, AXIS), tl.expand_dims(at_positive, AXIS),
    )  # fmt: skip


@triton.jit
def _at_positives(x, same, numbers, steep, gamma):
    """What focal terms take from the gradient at positives, each its own: [BLOCK_M, BLOCK_N]."""
    highest, rest, _, at_positive = numbers
    _, slope = focal(tl.where(same, steep * (x - highest) - rest, 0.0), gamma)
    return at_positive * slope


@triton.jit
def _owner(
    own, other, own_ids, other_ids, own_statistics, other_statistics, shares, grad, weight, scale, gamma,
    own_grad, other_grad, at_scale, tile, shift, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, GRAD_DOT: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of BLOCK_M samples of one side; sample i's positive without ids is i + shift of the other."""
    m = tile * BLOCK_M
    i = m + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    sign, steep = _slope(scale)
    if RESIDENT or other_grad is not None:
        features = _load(own, i, d, depth)
    if own_statistics is not None:
        own_numbers = _numbers(own_statistics, shares, grad, weight, i, own[1], 1)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    by_scale = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, other[1], BLOCK_N):
        j = n + tl.arange(0, BLOCK_N)
        if RESIDENT:
            others = _load(other, j, d, depth)
            products = tl.dot(features.to(DOT), tl.trans(others.to(DOT)), input_precision=PRECISION)
        else:
            products = _products(own, other, i, j, depth, BLOCK_K, DOT, PRECISION)
            others = _load(other, j, d, depth)
        x = sign * products
        live = (i < own[1])[:, None] & (j < other[1])[None, :]
        terms = gamma != 0.0
        if own_ids is None:
            same = i[:, None] + shift == j[None, :]
        else:
            same = _same(own_ids, other_ids, i, j, own[1], other[1])
            if terms:
                terms = tl.max(same.to(tl.int32)) > 0
        dz = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        hit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if own_statistics is not None:
            dz += own_numbers[2] * tl.exp(steep * (x - own_numbers[0]) - own_numbers[1])
            hit += own_numbers[3]
        if other_statistics is not None:
            numbers = _numbers(other_statistics, shares, grad, weight, j, other[1], 0)
            dz += numbers[2] * tl.exp(steep * (x - numbers[0]) - numbers[1])
            hit += numbers[3]
        if own_ids is not None:
            if terms:
                hit = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
                if own_statistics is not None:
                    hit += _at_positives(x, same, own_numbers, steep, gamma)
                if other_statistics is not None:
                    hit += _at_positives(x, same, numbers, steep, gamma)
        dz -= tl.where(same, hit, 0.0)
        dz = tl.where(live, dz, 0.0)
        if at_scale is not None:
            by_scale += tl.sum(dz * x, 1)
        total = tl.dot(dz.to(GRAD_DOT), others.to(GRAD_DOT), total, input_precision=GRAD_PRECISION)
        if other_grad is not None:
            part = tl.dot(tl.trans(dz.to(GRAD_DOT)), features.to(GRAD_DOT), input_precision=GRAD_PRECISION)
            place = other_grad + j[:, None].to(tl.int64) * depth + d[None, :]
            live_part = (j < other[1])[:, None] & (d < depth)[None, :]
            tl.atomic_add(place, sign * steep * part, mask=live_part, sem="relaxed")
    place = own_grad + i[:, None].to(tl.int64) * depth + d[None, :]
    tl.store(place, sign * steep * total, mask=(i < own[1])[:, None] & (d < depth)[None, :])
    if at_scale is not None:
        tl.store(at_scale + tile, sign * tl.sum(by_scale, 0))


@triton.jit
def _backward(
    rows, columns, row_ids, column_ids, statistics, grad, scale, gamma, rows_grad, columns_grad, added, at_scale,
    height, width, depth, first_row, row_stride, column_stride, BOTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, RESIDENT: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, GRAD_DOT: tl.constexpr, GRAD_PRECISION: tl.constexpr,
):  # fmt: skip
    """The first programs own rows, the others columns; where rows' owners add to the columns' gradient, there are none."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(height, BLOCK_M)
    gamma = tl.load(gamma).to(tl.float32)
    left, right = (rows, height, row_stride), (columns, width, column_stride)
    by_column = statistics + 3 * height if BOTH else None
    shares = None if row_ids is None else statistics + (6 if BOTH else 3) * height
    weight: tl.constexpr = 0.5 if BOTH else 1.0  # of a direction in the loss
    if (tile < row_tiles) | (added is not None):
        _owner(
            left, right, row_ids, column_ids, statistics, by_column, shares, grad, weight, scale, gamma,
            rows_grad, added, at_scale, tile, first_row, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, RESIDENT, DOT, PRECISION, GRAD_DOT, GRAD_PRECISION,
        )  # fmt: skip
    else:
        _owner(
            right, left, column_ids, row_ids, by_column, statistics, shares, grad, weight, scale, gamma,
            columns_grad, None, None, tile - row_tiles, -first_row, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_D, RESIDENT, DOT, PRECISION, GRAD_DOT, GRAD_PRECISION,
        )  # fmt: skip


def _sides(
    rows: Tensor, columns: Tensor, row_ids: Tensor | None, column_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides as the kernels read them."""
    ids = (None, None) if row_ids is None else (row_ids.contiguous(), column_ids.contiguous())
    return last_contiguous(rows), last_contiguous(columns), *ids


def forward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    gamma: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """rows [B, D], columns [G, D] -> loss [B] and, per direction, three statistics [B]: the maximum of the logits, the
    log of the sum of their exponentials under it, and the mean of h(p) over the positives; with ids, as the last
    statistic, one over the number of positives."""
    sides = _sides(rows, columns, row_ids, column_ids)
    (height, depth), width = rows.shape, len(columns)
    options = config(TILES, rows) | dots(rows)
    row_tiles, column_tiles = triton.cdiv(height, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_N"])
    per_sample = rows.new_empty((height,), dtype=torch.float32)
    positives = torch.empty_like(per_sample) if row_ids is None else None
    numbers = 2 if row_ids is None else 4
    row_sums = per_sample.new_empty((column_tiles, numbers, height))
    column_sums = per_sample.new_empty((row_tiles, numbers, width)) if both else None
    strides = rows.stride(0), columns.stride(0)
    launch(
        _tiles, (row_tiles * column_tiles,),
        *sides, scale, row_sums, column_sums, positives,
        height, width, depth, first_row, *(side.stride(0) for side in sides[:2]), **options,
    )  # fmt: skip
    loss = torch.empty_like(per_sample)
    statistics = per_sample.new_empty(((6 if both else 3) + (row_ids is not None), height))
    options = config(FINISH, rows) | dots(rows)
    launch(
        _finish, (triton.cdiv(height, options["BLOCK_M"]),),
        *sides, scale, gamma, row_sums, column_sums, positives, loss, statistics,
        height, width, depth, *(side.stride(0) for side in sides[:2]), row_tiles, column_tiles, **options,
    )  # fmt: skip
    return loss, statistics


def backward(
    grad: Tensor,
    statistics: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    gamma: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, columns and scale for the gradient [B] of the loss."""
    sides = _sides(rows, columns, row_ids, column_ids)
    (height, depth), width = rows.shape, len(columns)
    options = config(BACKWARD, rows) | dots(rows)
    gradients = rows.new_empty(rows.shape), columns.new_empty(columns.shape)
    row_tiles, column_tiles = triton.cdiv(height, options["BLOCK_M"]), triton.cdiv(width, options["BLOCK_M"])
    added = columns.new_zeros(columns.shape, dtype=torch.float32) if ATOMICS else None
    at_scale = grad.new_empty((row_tiles,))
    # A gradient at the logits may be too small for fp16.
    as_fp32 = {"GRAD_DOT": tl.float32, "GRAD_PRECISION": "tf32"}
    of_grad = as_fp32 if rows.dtype == torch.float16 else {f"GRAD_{key}": value for key, value in dots(rows).items()}
    launch(
        _backward, (row_tiles if ATOMICS else row_tiles + column_tiles,),
        *sides, statistics, grad.contiguous(), scale, gamma, *gradients, added, at_scale,
        height, width, depth, first_row, *(side.stride(0) for side in sides[:2]), both,
        BLOCK_D=max(16, triton.next_power_of_2(depth)), **options, **of_grad,
    )  # fmt: skip
    at_columns = gradients[1] if added is None else added.to(columns.dtype)
    return gradients[0], at_columns, at_scale.sum(dtype=scale.dtype)
