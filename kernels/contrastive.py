"""focal_contrastive_loss: logits exist one tile at a time; only their sums per row and per column are stored.

In forward, a program multiplies one tile of rows with one tile of columns and writes its part of the log-sum-exp of
each row and column. A second launch joins the parts of each sample in a fixed order and computes its loss. The logits
of positives come from the tiles too. If a row has several positives and gamma is not 0, the second launch recomputes
the tiles that hold positives. Backward is one launch (contrastive_backward.py). Forward and backward take five
products, and their results are reproducible to the bit.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import focal
from softmask.kernels._launch import Configs, cdiv, config, dots, factor_dots, launch, next_power_of_2
from softmask.kernels._similarity import as_read, multiply, same_ids, steepness
from softmask.kernels.contrastive_backward import backward_config, bwd_kernel

ATOMICS = os.environ.get("SOFTMASK_ATOMICS", "0") not in ("", "0")  # one product fewer, but not reproducible to the bit
GROUP: tl.constexpr = tl.constexpr(8)  # row tiles with neighbouring programs, which share columns in the cache
JOINED: tl.constexpr = tl.constexpr(32)  # tiles whose sums are joined at a time
REGISTERS = 128  # per thread in fp32: with one more, one block fewer fits
LOWEST: tl.constexpr = tl.constexpr(-1e30)  # maximum of an empty set: finite, because inf - inf is NaN

TILES: Configs = {
    0: {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32},
    80: {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
}
# For IEEE products of fp32 with ids, whose comparisons need registers too: half a tile for half the threads, which may
# use more registers each.
TILES_WITH_IDS: Configs = {
    0: TILES[0],
    80: TILES[80] | {"BLOCK_M": 64, "num_warps": 4, "maxnreg": 168},
    90: TILES[80] | {"maxnreg": REGISTERS},
    100: TILES[80] | {"BLOCK_M": 64, "num_warps": 4, "maxnreg": REGISTERS},
}
FINISH: Configs = {
    0: {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32},
    80: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def _store_sums(sums_ptr, similarity, steep, tile, index, size, AXIS: tl.constexpr, NUMBERS: tl.constexpr):
    """Stores a tile's part of the sums of its rows (AXIS 1) or columns (AXIS 0) in sums [tiles, NUMBERS, size]: the
    maximum, and the sum of exponentials relative to it."""
    place_ptrs = sums_ptr + tile.to(tl.int64) * (NUMBERS * size) + index
    highest = tl.maximum(tl.max(similarity, AXIS), LOWEST)
    tl.store(place_ptrs, highest, mask=index < size)
    tl.store(
        place_ptrs + size, tl.sum(tl.exp(steep * (similarity - tl.expand_dims(highest, AXIS))), AXIS), mask=index < size
    )


@triton.jit
def _store_both(
    row_sums_ptr,
    column_sums_ptr,
    similarity,
    steep,
    row_tile,
    column_tile,
    row,
    column,
    height,
    width,
    NUMBERS: tl.constexpr,
):
    """Stores a tile's part of the sums of its rows and, if requested, of its columns."""
    _store_sums(row_sums_ptr, similarity, steep, column_tile, row, height, 1, NUMBERS)
    if column_sums_ptr is not None:
        _store_sums(column_sums_ptr, similarity, steep, row_tile, column, width, 0, NUMBERS)


@triton.jit
def _store_positives(sums_ptr, similarity, same, tile, index, size, AXIS: tl.constexpr):
    """Stores the third and fourth of four sums: the products of positives, and their number."""
    place_ptrs = sums_ptr + tile.to(tl.int64) * (4 * size) + index
    tl.store(place_ptrs + 2 * size, tl.sum(tl.where(same, similarity, 0.0), AXIS), mask=index < size)
    tl.store(place_ptrs + 3 * size, tl.sum(same.to(tl.float32), AXIS), mask=index < size)


@triton.jit
def _fwd_tiles_kernel(
    rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, row_sums_ptr, column_sums_ptr, positives_ptr,
    height, width, depth, first_row, stride_rn, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SUMS_FIRST: tl.constexpr,
):  # fmt: skip
    """Sums of one tile and, without ids, the logits of its positives."""
    num_row_tiles, num_column_tiles = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    program = tl.program_id(0)
    row_tile, column_tile = tl.swizzle2d(
        program // num_column_tiles, program % num_column_tiles, num_row_tiles, num_column_tiles, GROUP
    )
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    left, right = (rows_ptr, height, stride_rn), (columns_ptr, width, stride_cn)
    sign, steep = steepness(tl.load(scale_ptr).to(tl.float32))
    similarity = sign * multiply(left, right, row, column, depth, BLOCK_K, DOT, PRECISION)
    similarity = tl.where((row < height)[:, None] & (column < width)[None, :], similarity, float("-inf"))
    # IEEE products leave few registers for what follows. With them, computing the sums before the positives needs
    # fewer; otherwise the other order does.
    NUMBERS: tl.constexpr = 2 if row_ids_ptr is None else 4
    if SUMS_FIRST:
        _store_both(
            row_sums_ptr, column_sums_ptr, similarity, steep, row_tile, column_tile, row, column, height, width, NUMBERS
        )
    if row_ids_ptr is not None:
        same = same_ids(row_ids_ptr, column_ids_ptr, row, column, height, width)
        _store_positives(row_sums_ptr, similarity, same, column_tile, row, height, 1)
        if column_sums_ptr is not None:
            _store_positives(column_sums_ptr, similarity, same, row_tile, column, width, 0)
    elif (column_tile * BLOCK_N < (row_tile + 1) * BLOCK_M + first_row) & (
        row_tile * BLOCK_M + first_row < (column_tile + 1) * BLOCK_N
    ):
        positive = row + first_row
        product = tl.sum(tl.where(column[None, :] == positive[:, None], similarity, 0.0), 1)
        tl.store(positives_ptr + row, product, mask=(row < height) & (positive // BLOCK_N == column_tile))
    if not SUMS_FIRST:
        _store_both(
            row_sums_ptr, column_sums_ptr, similarity, steep, row_tile, column_tile, row, column, height, width, NUMBERS
        )


@triton.jit
def _join(sums_ptr, steep, tiles, index, size, NUMBERS: tl.constexpr):
    """Joins the sums of samples `index` over all tiles: (maximum, log of the sum of exponentials, sum of the positives'
    products, number of positives)."""
    highest = tl.full([index.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([index.shape[0]], tl.float32)
    hits, count = total, total
    for start in range(0, tiles, JOINED):
        tile = start + tl.arange(0, JOINED)
        place_ptrs = sums_ptr + tile[:, None].to(tl.int64) * (NUMBERS * size) + index[None, :]
        live = (tile < tiles)[:, None]
        tops = tl.load(place_ptrs, mask=live, other=LOWEST)  # [JOINED, BLOCK_M]
        before, highest = highest, tl.maximum(highest, tl.max(tops, 0))
        part = tl.load(place_ptrs + size, mask=live, other=0.0) * tl.exp(steep * (tops - highest[None, :]))
        total = total * tl.exp(steep * (before - highest)) + tl.sum(part, 0)
        if NUMBERS == 4:
            hits += tl.sum(tl.load(place_ptrs + 2 * size, mask=live, other=0.0), 0)
            count += tl.sum(tl.load(place_ptrs + 3 * size, mask=live, other=0.0), 0)
    return highest, tl.log(total), hits, count


@triton.jit
def _over_positives(
    own, other, own_ids_ptr, other_ids_ptr, first, highest, rest, sign, steep, gamma, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of the focal terms and of their slopes over the positives of BLOCK_M samples from `first` on. Only tiles
    that hold positives are multiplied."""
    sample = first + tl.arange(0, BLOCK_M)
    loss = tl.zeros([BLOCK_M], tl.float32)
    slope = loss
    for other_first in range(0, other[1], BLOCK_N):
        other_sample = other_first + tl.arange(0, BLOCK_N)
        same = same_ids(own_ids_ptr, other_ids_ptr, sample, other_sample, own[1], other[1])
        if tl.max(same.to(tl.int32)) > 0:
            similarity = sign * multiply(own, other, sample, other_sample, depth, BLOCK_K, DOT, PRECISION)
            log_p = steep * (similarity - highest[:, None]) - rest[:, None]
            losses, slopes = focal(tl.where(same, log_p, 0.0), gamma)
            loss += tl.sum(tl.where(same, losses, 0.0), 1)
            slope += tl.sum(tl.where(same, slopes, 0.0), 1)
    return loss, slope


@triton.jit
def _direction(
    own, other, own_ids_ptr, other_ids_ptr, sums_ptr, tiles, positives_ptr, statistics_ptr,
    first, sign, steep, gamma, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and number of positives, in one direction, of BLOCK_M samples from `first` on; stores three statistics."""
    size = own[1]
    sample = first + tl.arange(0, BLOCK_M)
    index = tl.minimum(sample, size - 1)
    highest, rest, hits, count = _join(sums_ptr, steep, tiles, index, size, 2 if own_ids_ptr is None else 4)
    if own_ids_ptr is None:
        positive = tl.load(positives_ptr + index)
    else:
        positive = hits / count
    loss, slope = focal(steep * (positive - highest) - rest, gamma)
    if own_ids_ptr is not None:
        if gamma != 0.0:  # then not a function of the mean logit
            loss, slope = _over_positives(
                own, other, own_ids_ptr, other_ids_ptr, first, highest, rest, sign, steep, gamma, depth,
                BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
            )  # fmt: skip
            loss, slope = loss / count, slope / count
    live = sample < size
    tl.store(statistics_ptr + sample, highest, mask=live)
    tl.store(statistics_ptr + size + sample, rest, mask=live)
    tl.store(statistics_ptr + 2 * size + sample, slope, mask=live)
    return loss, count


@triton.jit
def _fwd_finish_kernel(
    rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale_ptr, gamma_ptr,
    row_sums_ptr, column_sums_ptr, positives_ptr, loss_ptr, statistics_ptr,
    height, width, depth, stride_rn, stride_cn, num_row_tiles, num_column_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of BLOCK_M samples."""
    first = tl.program_id(0) * BLOCK_M
    sample = first + tl.arange(0, BLOCK_M)
    sign, steep = steepness(tl.load(scale_ptr).to(tl.float32))
    gamma = tl.load(gamma_ptr).to(tl.float32)
    left, right = (rows_ptr, height, stride_rn), (columns_ptr, width, stride_cn)
    total, count = _direction(
        left, right, row_ids_ptr, column_ids_ptr, row_sums_ptr, num_column_tiles, positives_ptr, statistics_ptr,
        first, sign, steep, gamma, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    shares_ptr = statistics_ptr + 3 * height
    if column_sums_ptr is not None:
        by_column, _ = _direction(
            right, left, column_ids_ptr, row_ids_ptr, column_sums_ptr, num_row_tiles, positives_ptr, shares_ptr,
            first, sign, steep, gamma, depth,
            BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
        )  # fmt: skip
        total = 0.5 * (total + by_column)
        shares_ptr += 3 * height
    tl.store(loss_ptr + sample, total, mask=sample < height)
    if row_ids_ptr is not None:
        tl.store(shares_ptr + sample, 1.0 / count, mask=sample < height)


def _config(table: Configs, rows: Tensor, width: int, *, with_ids: bool) -> dict[str, Any]:
    """In fp32, logits are summed in backward's blocks of features, because backward must find the same values: where a
    row is right, a rounding error of its largest logit is a large part of its gradient."""
    options = config(table, rows) | dots(rows)
    if rows.dtype == torch.float32:
        options["BLOCK_K"] = backward_config(rows, width, with_ids=with_ids, atomics=ATOMICS)["BLOCK_K"]
    return options


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
    """rows [B, D], columns [G, D] -> loss [B] and three statistics [B] per direction: the maximum of the logits, the
    log of the sum of their exponentials relative to it, and the mean of h(p) over the positives. With ids, the last
    statistic is one over the number of positives."""
    sides = as_read(rows, columns, row_ids, column_ids)
    (height, depth), width = rows.shape, len(columns)
    exact = rows.dtype == torch.float32 and dots(rows)["PRECISION"] == "ieee"
    table = TILES_WITH_IDS if exact and row_ids is not None else TILES
    options = _config(table, rows, width, with_ids=row_ids is not None)
    if exact:
        options.setdefault("maxnreg", REGISTERS)
    row_tiles, column_tiles = cdiv(height, options["BLOCK_M"]), cdiv(width, options["BLOCK_N"])
    per_sample = rows.new_empty((height,), dtype=torch.float32)
    positives = torch.empty_like(per_sample) if row_ids is None else None
    numbers = 2 if row_ids is None else 4
    row_sums = per_sample.new_empty((column_tiles, numbers, height))
    column_sums = per_sample.new_empty((row_tiles, numbers, width)) if both else None
    launch(
        _fwd_tiles_kernel, (row_tiles * column_tiles,),
        *sides, scale, row_sums, column_sums, positives,
        height, width, depth, first_row, *(side.stride(0) for side in sides[:2]), SUMS_FIRST=exact, **options,
    )  # fmt: skip
    loss = torch.empty_like(per_sample)
    statistics = per_sample.new_empty(((6 if both else 3) + (row_ids is not None), height))
    options = _config(FINISH, rows, width, with_ids=row_ids is not None)
    launch(
        _fwd_finish_kernel, (cdiv(height, options["BLOCK_M"]),),
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
    """Gradients of rows, columns and scale, given the gradient [B] of the loss."""
    sides = as_read(rows, columns, row_ids, column_ids)
    (height, depth), width = rows.shape, len(columns)
    options = backward_config(rows, width, with_ids=row_ids is not None, atomics=ATOMICS) | dots(rows)
    row_tiles, column_tiles = cdiv(height, options["BLOCK_M"]), cdiv(width, options["BLOCK_M"])
    at_rows, at_scale = rows.new_empty(rows.shape), grad.new_empty((row_tiles,))
    at_columns = columns.new_zeros(columns.shape, dtype=torch.float32) if ATOMICS else columns.new_empty(columns.shape)
    of_grad = factor_dots(rows)
    launch(
        bwd_kernel, (row_tiles if ATOMICS else row_tiles + column_tiles,),
        *sides, statistics, grad.contiguous(), scale, gamma, at_rows, at_columns, at_scale,
        height, width, depth, first_row, *(side.stride(0) for side in sides[:2]), both, ATOMICS,
        BLOCK_D=max(16, next_power_of_2(depth)), **options,
        GRAD_DOT=of_grad["DOT"], GRAD_PRECISION=of_grad["PRECISION"], updates=ATOMICS,
    )  # fmt: skip
    return at_rows, at_columns.to(columns.dtype), at_scale.sum(dtype=scale.dtype)
