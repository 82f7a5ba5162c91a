"""focal_contrastive_loss: logits exist one tile at a time; only their sums per row and per column are stored.

In forward, a program owns a region of tiles. It multiplies one tile of rows with one of columns after the other, and
adds each to its own part of the log-sum-exp of each row and column; there are about as many programs as fill a GPU, so
the parts take O(N) memory. A second launch joins the parts of each sample in a fixed order and computes its loss. The
logits of positives come from the tiles too. If a row has several positives and gamma is not 0, the second launch
recomputes the tiles that hold positives. Backward is one launch (contrastive_backward.py). Forward and backward take
five products, and their results are reproducible to the bit.
"""

from __future__ import annotations

import os
from math import isqrt
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._focal import focal
from softmask.kernels._launch import Configs, cdiv, config, dots, factor_dots, launch, next_power_of_2, type_of
from softmask.kernels._math import LOG2E, exp, number
from softmask.kernels._similarity import as_read, multiply, same_ids, steepness
from softmask.kernels.contrastive_backward import backward_config, bwd_kernel

ATOMICS = os.environ.get("SOFTMASK_ATOMICS", "0") not in ("", "0")  # one product fewer, but not reproducible to the bit
GROUP: tl.constexpr = tl.constexpr(8)  # regions with neighbouring programs, which share columns in the cache
JOINED: tl.constexpr = tl.constexpr(32)  # regions whose sums are joined at a time
REGISTERS = 128  # per thread in fp32: with one more, one block fewer fits
MORE_REGISTERS = 168  # the same where that is not enough
MOST_REGISTERS = 255  # that a thread can have
MOST_SUMS = 4  # times the features' bytes: the sums of single tiles if they take no more memory than this
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
# Of regions, whose loops need registers too. PROGRAMS: two on each multiprocessor.
REGIONS: Configs = {
    0: TILES[0] | {"PROGRAMS": 2},
    80: TILES[80] | {"BLOCK_M": 64, "PROGRAMS": 216},
    90: TILES[80] | {"BLOCK_M": 64, "PROGRAMS": 264},
}
FINISH: Configs = {
    0: {"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 32},
    80: {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
}


@triton.jit
def _add_sums(sums_ptr, similarity, steep, sums_of, AXIS: tl.constexpr, NUMBERS: tl.constexpr, SINGLE: tl.constexpr):
    """Adds a tile to a region's part of the sums of its rows (AXIS 1) or columns (AXIS 0) in sums [parts, NUMBERS,
    size]: the maximum, and the sum of exponentials relative to it. A fresh part has no tile yet, that of a SINGLE tile
    gets no other."""
    part, fresh, index, size = sums_of
    place_ptrs = sums_ptr + part.to(tl.int64) * (NUMBERS * size) + index
    highest = tl.maximum(tl.max(similarity, AXIS), LOWEST)
    if not SINGLE:
        kept = (index < size) & (fresh == 0)
        before = tl.load(place_ptrs, mask=kept, other=LOWEST)
        before_total = tl.load(place_ptrs + size, mask=kept, other=0.0)
        highest = tl.maximum(highest, before)
    total = tl.sum(tl.exp2((steep * LOG2E) * (similarity - tl.expand_dims(highest, AXIS))), AXIS)
    if not SINGLE:
        total += before_total * exp(steep * (before - highest))
    tl.store(place_ptrs, highest, mask=index < size)
    tl.store(place_ptrs + size, total, mask=index < size)


@triton.jit
def _add_both(
    row_sums_ptr, column_sums_ptr, similarity, steep, rows_of, columns_of, NUMBERS: tl.constexpr, SINGLE: tl.constexpr
):
    """Adds a tile to the sums of its rows and, if requested, of its columns."""
    _add_sums(row_sums_ptr, similarity, steep, rows_of, 1, NUMBERS, SINGLE)
    if column_sums_ptr is not None:
        _add_sums(column_sums_ptr, similarity, steep, columns_of, 0, NUMBERS, SINGLE)


@triton.jit
def _add_positives(sums_ptr, similarity, same, sums_of, AXIS: tl.constexpr, SINGLE: tl.constexpr):
    """Adds a tile to the third and fourth of four sums: the products of positives, and their number."""
    part, fresh, index, size = sums_of
    place_ptrs = sums_ptr + part.to(tl.int64) * (4 * size) + 2 * size + index
    hits, count = tl.sum(tl.where(same, similarity, 0.0), AXIS), tl.sum(same.to(tl.float32), AXIS)
    if not SINGLE:
        kept = (index < size) & (fresh == 0)
        hits += tl.load(place_ptrs, mask=kept, other=0.0)
        count += tl.load(place_ptrs + size, mask=kept, other=0.0)
    tl.store(place_ptrs, hits, mask=index < size)
    tl.store(place_ptrs + size, count, mask=index < size)


@triton.jit
def _add_tile(
    left, right, row_ids_ptr, column_ids_ptr, row_sums_ptr, column_sums_ptr, positives_ptr,
    sign, steep, depth, first_row, row_tile, column_tile, row_part, column_part, fresh_rows, fresh_columns,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SUMS_FIRST: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Adds one tile to the sums and, without ids, stores the products of its positives."""
    height, width = left[1], right[1]
    row, column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    similarity = sign * multiply(left, right, row, column, depth, BLOCK_K, DOT, PRECISION)
    live = (row < height)[:, None] & (column < width)[None, :]
    # IEEE products leave few registers for what follows. With them, a branch needs too many, and computing the sums
    # before the positives needs fewer; otherwise the other order does.
    if SUMS_FIRST:
        similarity = tl.where(live, similarity, float("-inf"))
    else:
        if ((row_tile + 1) * BLOCK_M > height) | ((column_tile + 1) * BLOCK_N > width):
            similarity = tl.where(live, similarity, float("-inf"))
    rows_of, columns_of = (row_part, fresh_rows, row, height), (column_part, fresh_columns, column, width)
    NUMBERS: tl.constexpr = 2 if row_ids_ptr is None else 4
    if SUMS_FIRST:
        _add_both(row_sums_ptr, column_sums_ptr, similarity, steep, rows_of, columns_of, NUMBERS, SINGLE)
    if row_ids_ptr is not None:
        same = same_ids(row_ids_ptr, column_ids_ptr, row, column, height, width)
        _add_positives(row_sums_ptr, similarity, same, rows_of, 1, SINGLE)
        if column_sums_ptr is not None:
            _add_positives(column_sums_ptr, similarity, same, columns_of, 0, SINGLE)
    elif (column_tile * BLOCK_N < (row_tile + 1) * BLOCK_M + first_row) & (
        row_tile * BLOCK_M + first_row < (column_tile + 1) * BLOCK_N
    ):
        positive = row + first_row
        product = tl.sum(tl.where(column[None, :] == positive[:, None], similarity, 0.0), 1)
        tl.store(positives_ptr + row, product, mask=(row < height) & (positive // BLOCK_N == column_tile))
    if not SUMS_FIRST:
        _add_both(row_sums_ptr, column_sums_ptr, similarity, steep, rows_of, columns_of, NUMBERS, SINGLE)


@triton.jit
def _fwd_tiles_kernel(
    rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale, row_sums_ptr, column_sums_ptr, positives_ptr,
    height, width, depth, first_row, stride_rn, stride_cn, tiles_down, tiles_across,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    SUMS_FIRST: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """The sums of a region of tiles_down x tiles_across tiles, or of a SINGLE tile."""
    num_row_tiles, num_column_tiles = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    parts_down, parts_across = tl.cdiv(num_row_tiles, tiles_down), tl.cdiv(num_column_tiles, tiles_across)
    program = tl.program_id(0)
    down, across = tl.swizzle2d(program // parts_across, program % parts_across, parts_down, parts_across, GROUP)
    sign, steep = steepness(number(scale))
    left, right = (rows_ptr, height, stride_rn), (columns_ptr, width, stride_cn)
    if SINGLE:
        _add_tile(
            left, right, row_ids_ptr, column_ids_ptr, row_sums_ptr, column_sums_ptr, positives_ptr,
            sign, steep, depth, first_row, down, across, across, down, True, True,
            BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION, SUMS_FIRST, SINGLE,
        )  # fmt: skip
    else:
        top, start = down * tiles_down, across * tiles_across
        for row_tile in range(top, tl.minimum(top + tiles_down, num_row_tiles)):
            for column_tile in range(start, tl.minimum(start + tiles_across, num_column_tiles)):
                _add_tile(
                    left, right, row_ids_ptr, column_ids_ptr, row_sums_ptr, column_sums_ptr, positives_ptr,
                    sign, steep, depth, first_row, row_tile, column_tile, across, down,
                    column_tile == start, row_tile == top,
                    BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION, SUMS_FIRST, SINGLE,
                )  # fmt: skip
                tl.debug_barrier()  # before other threads read the sums


@triton.jit
def _join(sums_ptr, steep, parts, index, size, NUMBERS: tl.constexpr):
    """Joins the sums of samples `index` over all regions: (maximum, log of the sum of exponentials, sum of the
    positives' products, number of positives)."""
    highest = tl.full([index.shape[0]], LOWEST, tl.float32)
    total = tl.zeros([index.shape[0]], tl.float32)
    hits, count = total, total
    for start in range(0, parts, JOINED):
        part = start + tl.arange(0, JOINED)
        place_ptrs = sums_ptr + part[:, None].to(tl.int64) * (NUMBERS * size) + index[None, :]
        live = (part < parts)[:, None]
        tops = tl.load(place_ptrs, mask=live, other=LOWEST)  # [JOINED, BLOCK_M]
        before, highest = highest, tl.maximum(highest, tl.max(tops, 0))
        totals = tl.load(place_ptrs + size, mask=live, other=0.0) * exp(steep * (tops - highest[None, :]))
        total = total * exp(steep * (before - highest)) + tl.sum(totals, 0)
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
    own, other, own_ids_ptr, other_ids_ptr, sums_ptr, parts, positives_ptr, statistics_ptr,
    first, sign, steep, gamma, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and number of positives, in one direction, of BLOCK_M samples from `first` on; stores three statistics."""
    size = own[1]
    sample = first + tl.arange(0, BLOCK_M)
    index = tl.minimum(sample, size - 1)
    highest, rest, hits, count = _join(sums_ptr, steep, parts, index, size, 2 if own_ids_ptr is None else 4)
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
    rows_ptr, columns_ptr, row_ids_ptr, column_ids_ptr, scale, gamma,
    row_sums_ptr, column_sums_ptr, positives_ptr, loss_ptr, statistics_ptr,
    height, width, depth, stride_rn, stride_cn, parts_down, parts_across,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Loss and statistics of BLOCK_M samples."""
    first = tl.program_id(0) * BLOCK_M
    sample = first + tl.arange(0, BLOCK_M)
    sign, steep = steepness(number(scale))
    gamma = number(gamma)
    left, right = (rows_ptr, height, stride_rn), (columns_ptr, width, stride_cn)
    total, count = _direction(
        left, right, row_ids_ptr, column_ids_ptr, row_sums_ptr, parts_across, positives_ptr, statistics_ptr,
        first, sign, steep, gamma, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, DOT, PRECISION,
    )  # fmt: skip
    shares_ptr = statistics_ptr + 3 * height
    if column_sums_ptr is not None:
        by_column, _ = _direction(
            right, left, column_ids_ptr, row_ids_ptr, column_sums_ptr, parts_down, positives_ptr, shares_ptr,
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


def _tiles(
    rows: Tensor, width: int, *, exact: bool, numbers: int
) -> tuple[dict[str, Any], tuple[int, int], tuple[int, int]]:
    """(options of the first launch, tiles down and across in a region, regions down and across). Regions are single
    tiles if the sums of all tiles take little memory."""
    (height, depth), with_ids = rows.shape, numbers == 4
    options = _config(TILES_WITH_IDS if exact and with_ids else TILES, rows, width, with_ids=with_ids)
    if exact:
        options["maxnreg"] = MORE_REGISTERS if depth % 4 else options.get("maxnreg", REGISTERS)
    down, across = cdiv(height, options["BLOCK_M"]), cdiv(width, options["BLOCK_N"])
    bytes_of_sums = 4 * numbers * (across * height + down * width)
    if bytes_of_sums <= MOST_SUMS * (height + width) * depth * rows.element_size():
        return options, (1, 1), (down, across)
    options = _config(REGIONS, rows, width, with_ids=with_ids)
    if exact:
        options |= {"maxnreg": MOST_REGISTERS, "num_stages": 2}
    down, across = cdiv(height, options["BLOCK_M"]), cdiv(width, options["BLOCK_N"])
    tiles = cdiv(down * across, options.pop("PROGRAMS"))
    tiles_down = max(min(isqrt(tiles), down), 1)
    tiles_across = max(cdiv(tiles, tiles_down), 1)
    return options, (tiles_down, tiles_across), (cdiv(down, tiles_down), cdiv(across, tiles_across))


def forward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    gamma: Tensor | float,
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
    numbers = 2 if row_ids is None else 4
    options, region, (parts_down, parts_across) = _tiles(rows, width, exact=exact, numbers=numbers)
    per_sample = rows.new_empty((height,), dtype=torch.float32)
    positives = torch.empty_like(per_sample) if row_ids is None else None
    row_sums = per_sample.new_empty((parts_across, numbers, height))
    column_sums = per_sample.new_empty((parts_down, numbers, width)) if both else None
    launch(
        _fwd_tiles_kernel, (parts_down * parts_across,),
        *sides, scale, row_sums, column_sums, positives,
        height, width, depth, first_row, *(side.stride(0) for side in sides[:2]), *region,
        SUMS_FIRST=exact, SINGLE=region == (1, 1), **options,
    )  # fmt: skip
    loss = torch.empty_like(per_sample)
    statistics = per_sample.new_empty(((6 if both else 3) + (row_ids is not None), height))
    options = _config(FINISH, rows, width, with_ids=row_ids is not None)
    if exact and row_ids is not None:
        options["maxnreg"] = MOST_REGISTERS
    launch(
        _fwd_finish_kernel, (cdiv(height, options["BLOCK_M"]),),
        *sides, scale, gamma, row_sums, column_sums, positives, loss, statistics,
        height, width, depth, *(side.stride(0) for side in sides[:2]), parts_down, parts_across, **options,
    )  # fmt: skip
    return loss, statistics


def backward(
    grad: Tensor,
    statistics: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor | float,
    gamma: Tensor | float,
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
    return at_rows, at_columns.to(columns.dtype), at_scale.sum(dtype=type_of(scale))
