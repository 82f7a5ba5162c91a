"""The two streams of momentum_contrastive over the keys; momentum_contrastive.py says what they are for.

Side 0 are the rows of images, whose keys are texts, side 1 the reverse. Keys are those of the batch and then the
queue's, by tiles which belong to one of both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from softmask.kernels._focal import focal

STATISTICS: tl.constexpr = tl.constexpr(7)  # of a row in one split
LOWEST: tl.constexpr = tl.constexpr(-1e38)  # a logit of no key, and a maximum of nothing: differences are finite
LEAST: tl.constexpr = tl.constexpr(1e-30)  # a weight of no key, by which others can be divided


@triton.jit
def _place(rows, tiles, tiles_of_split, BLOCK_ROWS: tl.constexpr):
    """(split, number of splits, side, first row, first tile, last tile) of this program; neighbours read the same."""
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
def tile_of(
    start, first, rows, first_column, width, row_stride, column_stride,
    BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """[BLOCK, BLOCK_WIDTH] of a matrix, zeros beyond its edges."""
    row, column = tl.arange(0, BLOCK), first_column + tl.arange(0, BLOCK_WIDTH)
    start += tl.cast(first, tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
    return tl.load(start + place, mask=(first + row < rows)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _row_tile(of_rows, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    start, first, rows, width, stride = of_rows
    return tile_of(start, first, rows, first_column, width, stride, 1, BLOCK_ROWS, BLOCK_WIDTH)


@triton.jit
def _key_tile(tile, first_column, source, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """(keys [BLOCK_KEYS, BLOCK_WIDTH], their places in batch or queue, which of them exist, whether in the batch)."""
    keys, queue, count, queue_count, width, row_stride, column_stride, queue_row, queue_column = source
    first, tiles = tile * BLOCK_KEYS, tl.cdiv(count, BLOCK_KEYS)
    in_batch = tile < tiles
    if queue is not None:
        if tile >= tiles:
            keys = queue
        first -= tl.where(in_batch, 0, tiles * BLOCK_KEYS)
        count = tl.where(in_batch, count, queue_count)
        row_stride = tl.where(in_batch, row_stride, queue_row)
        column_stride = tl.where(in_batch, column_stride, queue_column)
    key = first + tl.arange(0, BLOCK_KEYS)
    k = tile_of(keys, first, count, first_column, width, row_stride, column_stride, BLOCK_KEYS, BLOCK_WIDTH)
    return k, key, key < count, in_batch


@triton.jit
def _known_by(ids, index, live, first_row):
    """What makes a row and a key positive: their id or, without ids, the row's place among the keys."""
    value = index.to(tl.int64) + first_row
    if ids is not None:
        value = tl.load(ids + index, mask=live, other=0)
    return value


@triton.jit
def _positives(own, ids, key, live, in_batch):
    """Which keys are the rows' positives, [BLOCK_ROWS, BLOCK_KEYS]; none of a queue without ids."""
    key_ids, queue_ids = ids
    if queue_ids is None:
        live = live & in_batch
    elif in_batch == 0:
        key_ids = queue_ids
    return (own[:, None] == _known_by(key_ids, key, live, 0)[None, :]) & live[None, :]


@triton.jit
def _logits(
    rows_of, tiles_of, k, live, tile, source, scale, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of student and teacher at a tile of keys k, [BLOCK_ROWS, BLOCK_KEYS] each; with WIDE by parts of the features."""
    if WIDE:
        z = tl.zeros([BLOCK_ROWS, live.shape[0]], tl.float32)
        t = z
        for column in range(0, source[4], BLOCK_WIDTH):
            part = tl.trans(_key_tile(tile, column, source, live.shape[0], BLOCK_WIDTH)[0].to(DOT))
            student = _row_tile(rows_of[0], column, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
            teacher = _row_tile(rows_of[1], column, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
            z = tl.dot(student, part, z, input_precision=PRECISION)
            t = tl.dot(teacher, part, t, input_precision=PRECISION)
    else:
        z = tl.dot(tiles_of[0], tl.trans(k), input_precision=PRECISION)
        t = tl.dot(tiles_of[1], tl.trans(k), input_precision=PRECISION)
    return tl.where(live[None, :], z * scale, LOWEST), tl.where(live[None, :], t * scale, LOWEST)


@triton.jit
def _store_sums(to, sums, at, live, first_column, width, BLOCK_WIDTH: tl.constexpr):
    """sums [BLOCK_ROWS, BLOCK_WIDTH] of keys to rows `at` of a matrix."""
    column = first_column + tl.arange(0, BLOCK_WIDTH)
    tl.store(to + at[:, None] * width + column[None, :], sums, mask=live[:, None] & (column < width)[None, :])


@triton.jit
def first_stream(
    image, text, image_teacher, text_teacher, image_keys, text_keys, image_queue, text_queue,
    scale, gamma, ids, key_ids, queue_ids, statistics, means, teacher_means,
    rows, count, queue_count, width, first_row, tiles, tiles_of_split,
    query_row, teacher_row, keys_row, keys_column, queue_row, queue_column,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Statistics of rows in one split, and the sums of keys under the exponentials of both softmaxes."""
    split, splits, side, first_of_rows, first, last = _place(rows, tiles, tiles_of_split, BLOCK_ROWS)
    first_column = tl.program_id(1) * BLOCK_WIDTH if WIDE else 0
    scale, gamma = tl.load(scale).to(tl.float32), tl.load(gamma).to(tl.float32)
    student = (_of_side(image, text, side), first_of_rows, rows, width, query_row)
    teacher = (_of_side(image_teacher, text_teacher, side), first_of_rows, rows, width, teacher_row)
    students = _row_tile(student, 0, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    teachers = _row_tile(teacher, 0, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    row = first_of_rows + tl.arange(0, BLOCK_ROWS)
    own = _known_by(ids, row, row < rows, first_row)
    keys, queue = _of_side(text_keys, image_keys, side), None
    if image_queue is not None:
        queue = _of_side(text_queue, image_queue, side)
    source = (keys, queue, count, queue_count, width, keys_row, keys_column, queue_row, queue_column)
    top = tl.full([BLOCK_ROWS], LOWEST, tl.float32)
    teacher_top = top
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    teacher_total, cross, positive, positives = total, total, total, total
    mean = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    teacher_mean = mean
    for tile in range(first, last):
        k, key, live, in_batch = _key_tile(tile, first_column, source, BLOCK_KEYS, BLOCK_WIDTH)
        k = k.to(DOT)
        z, t = _logits(
            (student, teacher), (students, teachers), k, live, tile, source, scale,
            BLOCK_ROWS, BLOCK_WIDTH, WIDE, DOT, PRECISION,
        )  # fmt: skip
        if in_batch | (queue_ids is not None):
            same = _positives(own, (key_ids, queue_ids), key, live, in_batch)
            positive += tl.sum(tl.where(same, z, 0.0), 1)
            positives += tl.sum(same.to(tl.float32), 1)
        before, teacher_before = top, teacher_top
        top, teacher_top = tl.maximum(before, tl.max(z, 1)), tl.maximum(teacher_before, tl.max(t, 1))
        shrink, teacher_shrink = tl.exp(before - top), tl.exp(teacher_before - teacher_top)
        z -= top[:, None]
        e, teacher_e = tl.exp(z), tl.exp(t - teacher_top[:, None])
        cross = teacher_shrink * (cross + teacher_total * (before - top)) + tl.sum(teacher_e * z, 1)
        total = total * shrink + tl.sum(e, 1)
        teacher_total = teacher_total * teacher_shrink + tl.sum(teacher_e, 1)
        if GRADIENT:
            k = k.to(FACTOR)
            mean = tl.dot(e.to(FACTOR), k, mean * shrink[:, None], input_precision=FACTOR_PRECISION)
            if gamma == 0.0:
                teacher_mean *= teacher_shrink[:, None]
                teacher_mean = tl.dot(teacher_e.to(FACTOR), k, teacher_mean, input_precision=FACTOR_PRECISION)
    at = (split * 2 + side).to(tl.int64) * rows + row
    state = (top, total, teacher_top, teacher_total, cross, positive, positives)
    for number in tl.static_range(STATISTICS):
        tl.store(statistics + number * splits * 2 * rows + at, state[number], mask=(row < rows) & (first_column == 0))
    if GRADIENT:
        _store_sums(means, mean, at, row < rows, first_column, width, BLOCK_WIDTH)
        if gamma == 0.0:
            _store_sums(teacher_means, teacher_mean, at, row < rows, first_column, width, BLOCK_WIDTH)


@triton.jit
def by_split(statistics, number, fill, side, row, rows, splits, BLOCK_SPLITS: tl.constexpr):
    """One of the statistics [numbers, splits, 2, rows]: [BLOCK_SPLITS, BLOCK_ROWS]."""
    split = tl.arange(0, BLOCK_SPLITS)
    place = ((number * splits + split[:, None]) * 2 + side).to(tl.int64) * rows + row[None, :]
    return tl.load(statistics + place, mask=(split < splits)[:, None] & (row < rows)[None, :], other=fill)


@triton.jit
def join(statistics, side, row, rows, splits, BLOCK_SPLITS: tl.constexpr):
    """Statistics over all splits.

    Of student and teacher each the highest logit, the sum of exponentials under it, and every split's part of a mean;
    the mean of z - highest under the teacher's softmax; the sum of the positives' logits; their number by split.
    """
    live = row < rows
    tops = by_split(statistics, 0, LOWEST, side, row, rows, splits, BLOCK_SPLITS)
    totals = by_split(statistics, 1, 0.0, side, row, rows, splits, BLOCK_SPLITS)
    teacher_tops = by_split(statistics, 2, LOWEST, side, row, rows, splits, BLOCK_SPLITS)
    teacher_totals = by_split(statistics, 3, 0.0, side, row, rows, splits, BLOCK_SPLITS)
    top, teacher_top = tl.where(live, tl.max(tops, 0), 0.0), tl.where(live, tl.max(teacher_tops, 0), 0.0)
    parts, teacher_parts = tl.exp(tops - top[None, :]), tl.exp(teacher_tops - teacher_top[None, :])
    total = tl.where(live, tl.sum(totals * parts, 0), 1.0)
    teacher_total = tl.where(live, tl.sum(teacher_totals * teacher_parts, 0), 1.0)
    teacher_parts /= teacher_total[None, :]
    cross = by_split(statistics, 4, 0.0, side, row, rows, splits, BLOCK_SPLITS)
    cross = tl.sum(teacher_parts * (cross + teacher_totals * (tops - top[None, :])), 0)
    positive = tl.sum(by_split(statistics, 5, 0.0, side, row, rows, splits, BLOCK_SPLITS), 0)
    positives = by_split(statistics, 6, 0.0, side, row, rows, splits, BLOCK_SPLITS)
    return (top, total, parts / total[None, :]), (teacher_top, teacher_total, teacher_parts), cross, positive, positives


@triton.jit
def _positive_keys(
    own, ids, source, first, last, first_column,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
    DOT: tl.constexpr, FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums of the rows' positive keys, from the tiles that have any."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for tile in range(first, last):
        k, key, live, in_batch = _key_tile(tile, first_column, source, BLOCK_KEYS, BLOCK_WIDTH)
        same = _positives(own, ids, key, live, in_batch)
        if tl.max(same.to(tl.int32)) > 0:
            total = tl.dot(same.to(FACTOR), k.to(DOT).to(FACTOR), total, input_precision=FACTOR_PRECISION)
    return total


@triton.jit
def _focal_targets(
    rows_of, tiles_of, own, ids, source, first, last, first_column, student, teacher, share, scale, alpha, gamma,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, WIDE: tl.constexpr,
    GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over tiles of keys: of y's focal terms, of the weights y h(p), of the keys under them.

    The latter is taken in units of the highest weight so far, which thus is not rounded: where a row is right, it
    nearly cancels with the student's own part of the gradient.
    """
    loss = tl.zeros([BLOCK_ROWS], tl.float32)
    slope, highest = loss, tl.full([BLOCK_ROWS], LEAST, tl.float32)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    log_total = tl.log(student[1])
    for tile in range(first, last):
        k, key, live, in_batch = _key_tile(tile, first_column, source, BLOCK_KEYS, BLOCK_WIDTH)
        k = k.to(DOT)
        z, t = _logits(rows_of, tiles_of, k, live, tile, source, scale, BLOCK_ROWS, BLOCK_WIDTH, WIDE, DOT, PRECISION)
        y = tl.exp(t - teacher[0][:, None]) * (alpha / teacher[1])[:, None]
        y += tl.where(_positives(own, ids, key, live, in_batch), share[:, None], 0.0)
        terms, slopes = focal(z - student[0][:, None] - log_total[:, None], gamma)
        weight = y * slopes
        loss += tl.sum(y * terms, 1)
        slope += tl.sum(weight, 1)
        if GRADIENT:
            before = highest
            highest = tl.maximum(before, tl.max(weight, 1))
            weight = (weight * (1.0 / highest)[:, None]).to(FACTOR)
            total *= (before / highest)[:, None]
            total = tl.dot(weight, k.to(FACTOR), total, input_precision=FACTOR_PRECISION)
    return loss, slope, total * highest[:, None]


@triton.jit
def second_stream(
    image, text, image_teacher, text_teacher, image_keys, text_keys, image_queue, text_queue,
    scale, alpha, gamma, ids, key_ids, queue_ids, statistics, terms, targets,
    rows, count, queue_count, width, first_row, tiles, tiles_of_split,
    query_row, teacher_row, keys_row, keys_column, queue_row, queue_column,
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Of rows in one split: at gamma 0 the share of each positive times their sum, without any nothing; at other gammas
    the focal terms, their slopes, and the sum of keys under the focal targets."""
    split, splits, side, first_of_rows, first, last = _place(rows, tiles, tiles_of_split, BLOCK_ROWS)
    scale, alpha, gamma = tl.load(scale).to(tl.float32), tl.load(alpha).to(tl.float32), tl.load(gamma).to(tl.float32)
    first_column = tl.program_id(1) * BLOCK_WIDTH if WIDE else 0
    row = first_of_rows + tl.arange(0, BLOCK_ROWS)
    own = _known_by(ids, row, row < rows, first_row)
    keys, queue = _of_side(text_keys, image_keys, side), None
    if image_queue is not None:
        queue = _of_side(text_queue, image_queue, side)
    source = (keys, queue, count, queue_count, width, keys_row, keys_column, queue_row, queue_column)
    statistics_of_side = join(statistics, side, row, rows, splits, BLOCK_SPLITS)
    share = (1.0 - alpha) / tl.maximum(tl.sum(statistics_of_side[4], 0), 1.0)
    at = (split * 2 + side).to(tl.int64) * rows + row
    if gamma == 0.0:
        if GRADIENT:
            in_split = tl.load(statistics + 6 * splits * 2 * rows + at, mask=row < rows, other=0.0)
            if tl.max(in_split, 0) > 0.0:
                total = _positive_keys(
                    own, (key_ids, queue_ids), source, first, last, first_column, BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH,
                    DOT, FACTOR, FACTOR_PRECISION,
                )  # fmt: skip
                _store_sums(targets, total * share[:, None], at, row < rows, first_column, width, BLOCK_WIDTH)
    else:
        student = (_of_side(image, text, side), first_of_rows, rows, width, query_row)
        teacher = (_of_side(image_teacher, text_teacher, side), first_of_rows, rows, width, teacher_row)
        students = _row_tile(student, 0, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        teachers = _row_tile(teacher, 0, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        loss, slope, total = _focal_targets(
            (student, teacher), (students, teachers), own, (key_ids, queue_ids), source, first, last, first_column,
            statistics_of_side[0], statistics_of_side[1], share, scale, alpha, gamma,
            BLOCK_ROWS, BLOCK_KEYS, BLOCK_WIDTH, WIDE, GRADIENT, DOT, PRECISION, FACTOR, FACTOR_PRECISION,
        )  # fmt: skip
        tl.store(terms + at, loss, mask=(row < rows) & (first_column == 0))
        tl.store(terms + splits * 2 * rows + at, slope, mask=(row < rows) & (first_column == 0))
        if GRADIENT:
            _store_sums(targets, total, at, row < rows, first_column, width, BLOCK_WIDTH)
