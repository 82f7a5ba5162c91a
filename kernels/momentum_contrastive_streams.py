"""The two streams of momentum_contrastive over the keys; momentum_contrastive.py explains what they are for.

Side 0 is the rows of images, whose keys are texts; side 1 is the reverse. Tiles of keys cover the batch's keys, then
the queue's; no tile covers both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softmask.kernels._focal import focal
from softmask.kernels._math import exp, number

STATISTICS: tl.constexpr = tl.constexpr(8)  # per row and split, from the first stream
TERMS: tl.constexpr = tl.constexpr(3)  # per row and split, from the second stream if gamma is not 0
LOWEST: tl.constexpr = tl.constexpr(-1e38)  # logit without key, maximum of an empty set: differences are finite
LEAST: tl.constexpr = tl.constexpr(1e-30)  # maximum weight of an empty set, by which others can be divided
LEAST_SCALE: tl.constexpr = tl.constexpr(1e-7)  # changes no logit by more than a rounding error


@triton.jit
def load_scale(given):
    """The scale, kept away from 0: its gradient is computed from sums of logits, divided by it."""
    scale = number(given)
    return tl.where(tl.abs(scale) < LEAST_SCALE, LEAST_SCALE, scale)


@triton.jit
def _place(rows, tiles, tiles_of_split, BLOCK_ROWS: tl.constexpr):
    """(split, number of splits, side, first row, first tile, last tile) of this program; neighbours read the same
    keys."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    program, splits = tl.program_id(0), tl.num_programs(0) // blocks // 2
    split = program // blocks // 2
    first = split * tiles_of_split
    last = tl.minimum(first + tiles_of_split, tiles)
    return split, splits, program // blocks % 2, program % blocks * BLOCK_ROWS, first, last


@triton.jit
def _of_side(image, text, side):
    chosen = image
    if side > 0:
        chosen = text
    return chosen


@triton.jit
def _tile_of(
    start_ptr, first, rows, first_column, strides,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Loads [BLOCK, BLOCK_WIDTH] of a matrix, with zeros beyond its edges."""
    row_stride, column_stride = strides
    row, column = tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK_WIDTH)
    start_ptr += tl.cast(first, tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
    live = (first + row < rows)[:, None]
    if WIDTH % BLOCK_WIDTH != 0:
        live = live & (column < WIDTH)[None, :]
    return tl.load(start_ptr + place, mask=live, other=0.0)


@triton.jit
def _row_tile(of_rows, first_column, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    start_ptr, first, rows, stride = of_rows
    return _tile_of(start_ptr, first, rows, first_column, (stride, 1), WIDTH, BLOCK_ROWS, BLOCK_WIDTH)


@triton.jit
def _keys_at(tile, source, BLOCK_KEYS: tl.constexpr):
    """(matrix of a tile of keys, their positions in it, which of them exist, whether it is the batch's)."""
    keys_ptr, queue_ptr, count, queue_count, keys_strides, queue_strides = source
    first, tiles = tile * BLOCK_KEYS, tl.cdiv(count, BLOCK_KEYS)
    in_batch = tile < tiles
    if keys_ptr.dtype == queue_ptr.dtype:
        if tile >= tiles:
            keys_ptr = queue_ptr
    first -= tl.where(in_batch, 0, tiles * BLOCK_KEYS)
    count = tl.where(in_batch, count, queue_count)
    row_stride = tl.where(in_batch, keys_strides[0], queue_strides[0])
    column_stride = tl.where(in_batch, keys_strides[1], queue_strides[1])
    key = first + tl.arange(0, BLOCK_KEYS)
    return (keys_ptr, queue_ptr, in_batch, first, count, row_stride, column_stride), key, key < count, in_batch


@triton.jit
def _key_tile(matrix, first_column, WIDTH: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    keys_ptr, queue_ptr, in_batch, first, count, row_stride, column_stride = matrix
    sizes = (row_stride, column_stride)
    if keys_ptr.dtype == queue_ptr.dtype:
        of_tile = _tile_of(keys_ptr, first, count, first_column, sizes, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
    else:  # a load reads nothing if the tile belongs to the other matrix
        own, others = tl.where(in_batch, count, 0), tl.where(in_batch, 0, count)
        of_tile = _tile_of(keys_ptr, first, own, first_column, sizes, WIDTH, BLOCK_KEYS, BLOCK_WIDTH).to(tl.float32)
        of_queue = _tile_of(queue_ptr, first, others, first_column, sizes, WIDTH, BLOCK_KEYS, BLOCK_WIDTH)
        of_tile = tl.where(in_batch, of_tile, of_queue.to(tl.float32))
    return of_tile


@triton.jit
def _known_by(ids_ptr, index, live, first_row):
    """What a row and its positive keys share: their id or, without ids, the row's position among the keys."""
    value = index.to(tl.int64) + first_row
    if ids_ptr is not None:
        value = tl.load(ids_ptr + index, mask=live, other=0)
    return value


@triton.jit
def _positives(own, key_ids_ptr, queue_ids_ptr, key, live, in_batch):
    """Which keys are the rows' positives, [BLOCK_ROWS, BLOCK_KEYS]. Without ids, the queue has none."""
    if queue_ids_ptr is None:
        live = live & in_batch
    elif in_batch == 0:
        key_ids_ptr = queue_ids_ptr
    return (own[:, None] == _known_by(key_ids_ptr, key, live, 0)[None, :]) & live[None, :]


@triton.jit
def _logits(
    rows_of, tiles_of, keys_of_tile, key_tile, scale,
    WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits of student and teacher for a tile of keys, [BLOCK_ROWS, BLOCK_KEYS] each. With WIDE, features are
    multiplied in parts; fp32 uses half as large parts, because its products take their operands from registers."""
    if WIDE:
        logit = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
        teacher_logit = logit
        PART: tl.constexpr = BLOCK_WIDTH // 2 if tl.float32 == DOT else BLOCK_WIDTH
        for column in range(0, WIDTH, PART):
            part = tl.trans(_key_tile(keys_of_tile, column, WIDTH, BLOCK_KEYS, PART).to(DOT))
            student = _row_tile(rows_of[0], column, WIDTH, BLOCK_ROWS, PART).to(DOT)
            teacher = _row_tile(rows_of[1], column, WIDTH, BLOCK_ROWS, PART).to(DOT)
            logit = tl.dot(student, part, logit, input_precision=PRECISION)
            teacher_logit = tl.dot(teacher, part, teacher_logit, input_precision=PRECISION)
    else:
        logit = tl.dot(tiles_of[0], tl.trans(key_tile), input_precision=PRECISION)
        teacher_logit = tl.dot(tiles_of[1], tl.trans(key_tile), input_precision=PRECISION)
    return logit * scale, teacher_logit * scale


@triton.jit
def _store_sums(out_ptr, sums, at, live, first_column, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Stores sums [BLOCK_ROWS, BLOCK_WIDTH] of keys to rows `at` of a matrix."""
    column = first_column + tl.arange(0, BLOCK_WIDTH)
    live = live[:, None] & (column < WIDTH)[None, :]
    tl.store(out_ptr + at[:, None].to(tl.int64) * WIDTH + column[None, :], sums, mask=live)


@triton.jit
def _add_tile(sums, logit, teacher_logit, DOT: tl.constexpr):
    """(sums of both softmaxes after a tile, both exponentials [BLOCK_ROWS, BLOCK_KEYS], both factors for earlier
    sums)."""
    FAST: tl.constexpr = tl.float32 != DOT
    highest, total, teacher_highest, teacher_total, spread, cross = sums
    before, teacher_before = highest, teacher_highest
    highest = tl.maximum(before, tl.max(logit, 1))
    teacher_highest = tl.maximum(teacher_before, tl.max(teacher_logit, 1))
    shrink, teacher_shrink = exp(before - highest, FAST), exp(teacher_before - teacher_highest, FAST)
    logit -= highest[:, None]
    exponential, teacher_exponential = exp(logit, FAST), exp(teacher_logit - teacher_highest[:, None], FAST)
    spread = shrink * (spread + total * (before - highest)) + tl.sum(exponential * logit, 1)
    cross = teacher_shrink * (cross + teacher_total * (before - highest)) + tl.sum(teacher_exponential * logit, 1)
    total = total * shrink + tl.sum(exponential, 1)
    teacher_total = teacher_total * teacher_shrink + tl.sum(teacher_exponential, 1)
    sums = (highest, total, teacher_highest, teacher_total, spread, cross)
    return sums, exponential, teacher_exponential, shrink, teacher_shrink


@triton.jit
def _store_state(pointer, state, at, row, rows, splits, first_column):
    """Stores the numbers of each row, each in a plane of `pointer`; only the programs of the first columns do."""
    for place in tl.static_range(len(state)):
        tl.store(pointer + place * splits * 2 * rows + at, state[place], mask=(row < rows) & (first_column == 0))


@triton.jit
def fwd_first_stream_kernel(
    image_ptr, text_ptr, image_teacher_ptr, text_teacher_ptr,
    image_keys_ptr, text_keys_ptr, image_queue_ptr, text_queue_ptr,
    scale, gamma, ids_ptr, key_ids_ptr, queue_ids_ptr, statistics_ptr, mean_ptr, teacher_mean_ptr,
    num_rows, num_keys, num_queued, first_row, num_tiles, tiles_of_split,
    stride_qn, stride_tn, keys_strides, queue_strides,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics of rows in one split, and the sums of keys weighted by the exponentials of both softmaxes."""
    split, splits, side, first_of_rows, first, last = _place(num_rows, num_tiles, tiles_of_split, BLOCK_ROWS)
    first_column = tl.program_id(1) * BLOCK_WIDTH if WIDE else 0
    scale, gamma = load_scale(scale), number(gamma)
    student = (_of_side(image_ptr, text_ptr, side), first_of_rows, num_rows, stride_qn)
    teacher = (_of_side(image_teacher_ptr, text_teacher_ptr, side), first_of_rows, num_rows, stride_tn)
    students = _row_tile(student, 0, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    teachers = _row_tile(teacher, 0, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    row = first_of_rows + tl.arange(0, BLOCK_ROWS)
    own = _known_by(ids_ptr, row, row < num_rows, first_row)
    keys_ptr = _of_side(text_keys_ptr, image_keys_ptr, side)
    queue_ptr = keys_ptr  # read only with a queue; Triton 3.3 does not support None in a tuple
    if image_queue_ptr is not None:
        queue_ptr = _of_side(text_queue_ptr, image_queue_ptr, side)
    source = (keys_ptr, queue_ptr, num_keys, num_queued, keys_strides, queue_strides)
    highest, total = tl.full([BLOCK_ROWS], LOWEST, tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    spread, teacher_total, cross, positive, positives = total, total, total, total, total
    mean = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    teacher_highest, teacher_mean = highest, mean
    for tile in range(first, last):
        keys_of_tile, key, live, in_batch = _keys_at(tile, source, BLOCK_KEYS)
        key_tile = _key_tile(keys_of_tile, first_column, WIDTH, BLOCK_KEYS, BLOCK_WIDTH).to(DOT)
        logit, teacher_logit = _logits(
            (student, teacher), (students, teachers), keys_of_tile, key_tile, scale,
            WIDE, DOT, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        logit, teacher_logit = tl.where(live[None, :], logit, LOWEST), tl.where(live[None, :], teacher_logit, LOWEST)
        if in_batch | (queue_ids_ptr is not None):
            same = _positives(own, key_ids_ptr, queue_ids_ptr, key, live, in_batch)
            positive += tl.sum(tl.where(same, logit, 0.0), 1)
            positives += tl.sum(same.to(tl.float32), 1)
        sums = (highest, total, teacher_highest, teacher_total, spread, cross)
        sums, exponential, teacher_exponential, shrink, teacher_shrink = _add_tile(sums, logit, teacher_logit, DOT)
        highest, total, teacher_highest, teacher_total, spread, cross = sums
        if GRADIENT:
            key_tile = key_tile.to(FACTOR)
            mean = tl.dot(exponential.to(FACTOR), key_tile, mean * shrink[:, None], input_precision=FACTOR_PRECISION)
            if gamma == 0.0:
                teacher_mean *= teacher_shrink[:, None]
                teacher_mean = tl.dot(
                    teacher_exponential.to(FACTOR), key_tile, teacher_mean, input_precision=FACTOR_PRECISION
                )
    at = (split * 2 + side) * num_rows + row
    state = (highest, total, teacher_highest, teacher_total, spread, cross, positive, positives)
    _store_state(statistics_ptr, state, at, row, num_rows, splits, first_column)
    if GRADIENT:
        _store_sums(mean_ptr, mean, at, row < num_rows, first_column, WIDTH, BLOCK_WIDTH)
        if gamma == 0.0:
            _store_sums(teacher_mean_ptr, teacher_mean, at, row < num_rows, first_column, WIDTH, BLOCK_WIDTH)


@triton.jit
def places(side, row, rows, splits, BLOCK_SPLITS: tl.constexpr):
    """Positions of a number of every split in [splits, 2, rows], and which exist: [BLOCK_SPLITS, BLOCK_ROWS]."""
    split = tl.arange(0, BLOCK_SPLITS)[:, None]
    return (split * 2 + side) * rows + row[None, :], (split < splits) & (row < rows)[None, :]


@triton.jit
def join(statistics_ptr, at, live, row, rows, splits):
    """Joins the statistics of all splits.

    For student and teacher: the highest logit, the sum of exponentials relative to it, each split's share in a mean,
    and the mean of z - highest under the softmax. Then the sum of the positives' logits, and the number of positives
    per split.
    """
    step, exists = splits * 2 * rows, row < rows
    tops = tl.load(statistics_ptr + at, mask=live, other=LOWEST)
    totals = tl.load(statistics_ptr + step + at, mask=live, other=0.0)
    teacher_tops = tl.load(statistics_ptr + 2 * step + at, mask=live, other=LOWEST)
    teacher_totals = tl.load(statistics_ptr + 3 * step + at, mask=live, other=0.0)
    highest, teacher_highest = tl.where(exists, tl.max(tops, 0), 0.0), tl.where(exists, tl.max(teacher_tops, 0), 0.0)
    below = tops - highest[None, :]
    parts, teacher_parts = tl.exp(below), tl.exp(teacher_tops - teacher_highest[None, :])
    total = tl.where(exists, tl.sum(totals * parts, 0), 1.0)
    teacher_total = tl.where(exists, tl.sum(teacher_totals * teacher_parts, 0), 1.0)
    parts /= total[None, :]
    teacher_parts /= teacher_total[None, :]
    spread = tl.load(statistics_ptr + 4 * step + at, mask=live, other=0.0) + totals * below
    cross = tl.load(statistics_ptr + 5 * step + at, mask=live, other=0.0) + teacher_totals * below
    positive = tl.sum(tl.load(statistics_ptr + 6 * step + at, mask=live, other=0.0), 0)
    positives = tl.load(statistics_ptr + 7 * step + at, mask=live, other=0.0)
    student = (highest, total, parts, tl.sum(parts * spread, 0))
    return (
        student,
        (teacher_highest, teacher_total, teacher_parts, tl.sum(teacher_parts * cross, 0)),
        positive,
        positives,
    )


@triton.jit
def _positive_keys(
    own, key_ids_ptr, queue_ids_ptr, source, first, last, first_column,
    DOT: tl.constexpr, FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The sums of the rows' positive keys, from the tiles that have any."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for tile in range(first, last):
        keys_of_tile, key, live, in_batch = _keys_at(tile, source, BLOCK_KEYS)
        same = _positives(own, key_ids_ptr, queue_ids_ptr, key, live, in_batch)
        if tl.max(same.to(tl.int32)) > 0:
            key_tile = _key_tile(keys_of_tile, first_column, WIDTH, BLOCK_KEYS, BLOCK_WIDTH).to(DOT).to(FACTOR)
            total = tl.dot(same.to(FACTOR), key_tile, total, input_precision=FACTOR_PRECISION)
    return total


@triton.jit
def _focal_targets(
    rows_of, tiles_of, own, key_ids_ptr, queue_ids_ptr, source, first, last, first_column,
    student, teacher, share, scale, alpha, gamma,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of keys: of y's focal terms, of the weights y h(p), and of z - highest and the keys under these
    weights.

    The sum of keys is in units of the highest weight so far, which is thus not rounded: where a row is right, it nearly
    cancels with the student's part of the gradient.
    """
    loss = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], tl.float32)
    slope, spread, highest = loss, loss, tl.full([BLOCK_ROWS], LEAST, tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    log_total = tl.log(student[1])
    for tile in range(first, last):
        keys_of_tile, key, live, in_batch = _keys_at(tile, source, BLOCK_KEYS)
        key_tile = _key_tile(keys_of_tile, first_column, WIDTH, BLOCK_KEYS, BLOCK_WIDTH).to(DOT)
        logit, teacher_logit = _logits(
            rows_of, tiles_of, keys_of_tile, key_tile, scale,
            WIDE, DOT, PRECISION, WIDTH, BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        target = (
            exp(tl.where(live[None, :], teacher_logit, LOWEST) - teacher[0][:, None]) * (alpha / teacher[1])[:, None]
        )
        target += tl.where(_positives(own, key_ids_ptr, queue_ids_ptr, key, live, in_batch), share[:, None], 0.0)
        logit -= student[0][:, None]
        terms, slopes = focal(logit - log_total[:, None], gamma)
        weight = target * slopes
        loss += target * terms
        slope += weight
        spread += weight * logit
        if GRADIENT:
            before = highest
            highest = tl.maximum(before, tl.max(weight, 1))
            total *= (before / highest)[:, None]
            weight = (weight / highest[:, None]).to(FACTOR)
            total = tl.dot(weight, key_tile.to(FACTOR), total, input_precision=FACTOR_PRECISION)
    return (tl.sum(loss, 1), tl.sum(slope, 1), tl.sum(spread, 1)), total * highest[:, None]


@triton.jit
def fwd_second_stream_kernel(
    image_ptr, text_ptr, image_teacher_ptr, text_teacher_ptr,
    image_keys_ptr, text_keys_ptr, image_queue_ptr, text_queue_ptr,
    scale, alpha, gamma, ids_ptr, key_ids_ptr, queue_ids_ptr, statistics_ptr, terms_ptr, targets_ptr,
    num_rows, num_keys, num_queued, first_row, num_tiles, tiles_of_split,
    stride_qn, stride_tn, keys_strides, queue_strides,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """For rows in one split: at gamma 0, its part of the mean positive key, if it has any; at other gammas, the focal
    terms, their slopes, and the sum of keys weighted by the focal targets."""
    split, splits, side, first_of_rows, first, last = _place(num_rows, num_tiles, tiles_of_split, BLOCK_ROWS)
    scale = load_scale(scale)
    alpha, gamma = number(alpha), number(gamma)
    first_column = tl.program_id(1) * BLOCK_WIDTH if WIDE else 0
    row = first_of_rows + tl.arange(0, BLOCK_ROWS)
    keys_ptr = _of_side(text_keys_ptr, image_keys_ptr, side)
    queue_ptr = keys_ptr  # read only with a queue; Triton 3.3 does not support None in a tuple
    if image_queue_ptr is not None:
        queue_ptr = _of_side(text_queue_ptr, image_queue_ptr, side)
    source = (keys_ptr, queue_ptr, num_keys, num_queued, keys_strides, queue_strides)
    places_of_splits, exist = places(side, row, num_rows, splits, BLOCK_SPLITS)
    statistics_of_side = join(statistics_ptr, places_of_splits, exist, row, num_rows, splits)
    positives = tl.maximum(tl.sum(statistics_of_side[3], 0), 1.0)
    at = (split * 2 + side) * num_rows + row
    own = _known_by(ids_ptr, row, row < num_rows, first_row)
    if gamma == 0.0:
        if GRADIENT:
            in_split = tl.load(
                statistics_ptr + (STATISTICS - 1) * splits * 2 * num_rows + at, mask=row < num_rows, other=0.0
            )
            if tl.max(in_split, 0) > 0.0:
                total = _positive_keys(
                    own, key_ids_ptr, queue_ids_ptr, source, first, last, first_column,
                    DOT, FACTOR, FACTOR_PRECISION, WIDTH, BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH,
                )  # fmt: skip
                _store_sums(
                    targets_ptr, total / positives[:, None], at, row < num_rows, first_column, WIDTH, BLOCK_WIDTH
                )
    else:
        student = (_of_side(image_ptr, text_ptr, side), first_of_rows, num_rows, stride_qn)
        teacher = (_of_side(image_teacher_ptr, text_teacher_ptr, side), first_of_rows, num_rows, stride_tn)
        students = _row_tile(student, 0, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        teachers = _row_tile(teacher, 0, WIDTH, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        sums, total = _focal_targets(
            (student, teacher), (students, teachers), own, key_ids_ptr, queue_ids_ptr,
            source, first, last, first_column,
            statistics_of_side[0], statistics_of_side[1], (1.0 - alpha) / positives, scale, alpha, gamma,
            GRADIENT, WIDE, DOT, PRECISION, FACTOR, FACTOR_PRECISION, WIDTH, BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        _store_state(terms_ptr, sums, at, row, num_rows, splits, first_column)
        if GRADIENT:
            _store_sums(targets_ptr, total, at, row < num_rows, first_column, WIDTH, BLOCK_WIDTH)
