"""The two streams of momentum_contrastive over the keys; momentum_contrastive.py says what they are for.

Side 0 are the rows of images, whose keys are texts, side 1 the reverse. A matrix is the tuple (start, rows, columns,
stride of rows, stride of columns).
"""

from __future__ import annotations

import triton
import triton.language as tl

from softmask.kernels._focal import focal

STATISTICS: tl.constexpr = tl.constexpr(7)  # of a row in one split
LOWEST: tl.constexpr = tl.constexpr(-1e38)  # a logit of no key, and a maximum of nothing: differences are finite
LEAST: tl.constexpr = tl.constexpr(1e-30)  # a weight of no key, by which others can be divided


@triton.jit
def _of_side(image, text, side):
    chosen = image
    if side > 0:
        chosen = text
    return chosen


@triton.jit
def rows_from(first, matrix, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Rows of a matrix, zeros beyond its edges: [BLOCK, BLOCK_WIDTH]."""
    start, height, width, row_stride, column_stride = matrix
    row, column = tl.arange(0, BLOCK), tl.arange(0, BLOCK_WIDTH)
    start += tl.cast(first, tl.int64) * row_stride
    place = row[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride
    return tl.load(start + place, mask=(first + row < height)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _tiles_of(split, tiles_of_split, count, queue_count, QUEUED: tl.constexpr, BLOCK_KEYS: tl.constexpr):
    """First and last tile of a split's share of the batch's keys, which come first, or of the queue's."""
    first, tiles = split * tiles_of_split, tl.cdiv(count, BLOCK_KEYS)
    last = first + tiles_of_split
    if QUEUED:
        return tl.maximum(first - tiles, 0), tl.minimum(last - tiles, tl.cdiv(queue_count, BLOCK_KEYS))
    return first, tl.minimum(last, tiles)


@triton.jit
def _known_by(ids, index, count, first_row):
    """What makes a row and a key positive: their id or, without ids, the row's place among the keys."""
    value = index.to(tl.int64) + first_row
    if ids is not None:
        value = tl.load(ids + index, mask=index < count, other=0)
    return value


@triton.jit
def _same(own, other, key, count):
    """Which keys are the rows' positives: [BLOCK_ROWS, BLOCK_KEYS]."""
    return (own[:, None] == other[None, :]) & (key < count)[None, :]


@triton.jit
def _logits(students, teachers, k, live, scale, PRECISION: tl.constexpr):
    """Of a tile of keys: [BLOCK_ROWS, BLOCK_KEYS] each."""
    z = tl.dot(students, tl.trans(k), input_precision=PRECISION) * scale
    t = tl.dot(teachers, tl.trans(k), input_precision=PRECISION) * scale
    return tl.where(live[None, :], z, LOWEST), tl.where(live[None, :], t, LOWEST)


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
    counts = by_split(statistics, 6, 0.0, side, row, rows, splits, BLOCK_SPLITS)
    return (top, total, parts / total[None, :]), (teacher_top, teacher_total, teacher_parts), cross, positive, counts


@triton.jit
def _place(rows, BLOCK_ROWS: tl.constexpr):
    """(split, number of splits, side, first row) of this program; neighbours read the same keys."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    program, splits = tl.program_id(0), tl.num_programs(0) // blocks // 2
    return program // blocks // 2, splits, program // blocks % 2, program % blocks * BLOCK_ROWS


@triton.jit
def _absorb(
    state, students, teachers, own, keys, key_ids, first, last, scale, gamma,
    POSITIVES: tl.constexpr, GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """The state after some tiles of keys more."""
    top, total, teacher_top, teacher_total, cross, positive, count, mean, teacher_mean = state
    for tile in range(first, last):
        key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = rows_from(tile * BLOCK_KEYS, keys, BLOCK_KEYS, BLOCK_WIDTH).to(DOT)
        if POSITIVES:
            other = _known_by(key_ids, key, keys[1], 0)
        z, t = _logits(students, teachers, k, key < keys[1], scale, PRECISION)
        if POSITIVES:
            is_positive = _same(own, other, key, keys[1])
            positive += tl.sum(tl.where(is_positive, z, 0.0), 1)
            count += tl.sum(is_positive.to(tl.float32), 1)
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
    return top, total, teacher_top, teacher_total, cross, positive, count, mean, teacher_mean


@triton.jit
def first_stream(
    image, text, image_teacher, text_teacher, image_keys, text_keys, image_queue, text_queue,
    scale, gamma, ids, key_ids, queue_ids, statistics, means, teacher_means,
    rows, count, queue_count, width, first_row, tiles_of_split,
    query_row, teacher_row, keys_row, queue_row, queue_column,
    GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    split, splits, side, first_of_rows = _place(rows, BLOCK_ROWS)
    scale, gamma = tl.load(scale).to(tl.float32), tl.load(gamma).to(tl.float32)
    students = (_of_side(image, text, side), rows, width, query_row, 1)
    students = rows_from(first_of_rows, students, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    teachers = (_of_side(image_teacher, text_teacher, side), rows, width, teacher_row, 1)
    teachers = rows_from(first_of_rows, teachers, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
    row = first_of_rows + tl.arange(0, BLOCK_ROWS)
    own = _known_by(ids, row, rows, first_row)
    lowest, zero = tl.full([BLOCK_ROWS], LOWEST, tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)
    mean = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    state = (lowest, zero, lowest, zero, zero, zero, zero, mean, mean)
    first, last = _tiles_of(split, tiles_of_split, count, queue_count, False, BLOCK_KEYS)
    keys = (_of_side(text_keys, image_keys, side), count, width, keys_row, 1)
    state = _absorb(
        state, students, teachers, own, keys, key_ids, first, last, scale, gamma,
        True, GRADIENT, DOT, PRECISION, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
    )  # fmt: skip
    if image_queue is not None:
        first, last = _tiles_of(split, tiles_of_split, count, queue_count, True, BLOCK_KEYS)
        keys = (_of_side(text_queue, image_queue, side), queue_count, width, queue_row, queue_column)
        state = _absorb(
            state, students, teachers, own, keys, queue_ids, first, last, scale, gamma,
            queue_ids is not None, GRADIENT, DOT, PRECISION, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
    at = (split * 2 + side).to(tl.int64) * rows + row
    for number in tl.static_range(STATISTICS):
        tl.store(statistics + number * splits * 2 * rows + at, state[number], mask=row < rows)
    if GRADIENT:
        column = tl.arange(0, BLOCK_WIDTH)
        place, live = at[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]
        tl.store(means + place, state[STATISTICS], mask=live)
        if gamma == 0.0:
            tl.store(teacher_means + place, state[STATISTICS + 1], mask=live)


@triton.jit
def _positive_keys(
    total, own, keys, key_ids, first, last,
    DOT: tl.constexpr, FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds the rows' positive keys to total; tiles without any are not read."""
    for tile in range(first, last):
        key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        is_positive = _same(own, _known_by(key_ids, key, keys[1], 0), key, keys[1])
        if tl.max(is_positive.to(tl.int32)) > 0:
            k = rows_from(tile * BLOCK_KEYS, keys, BLOCK_KEYS, BLOCK_WIDTH).to(DOT).to(FACTOR)
            total = tl.dot(is_positive.to(FACTOR), k, total, input_precision=FACTOR_PRECISION)
    return total


@triton.jit
def _focal_targets(
    sums, students, teachers, own, keys, key_ids, first, last, student, teacher, share, scale, alpha, gamma,
    POSITIVES: tl.constexpr, GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds to sums, over tiles of keys: of y's focal terms, of the weights y h(p), of the keys under them.

    The latter are in units of the highest weight so far, which thus is not rounded: where a row is right, it nearly
    cancels with the student's own part of the gradient.
    """
    loss, slope, highest, total = sums
    top, log_total = student[0], tl.log(student[1])
    for tile in range(first, last):
        key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        k = rows_from(tile * BLOCK_KEYS, keys, BLOCK_KEYS, BLOCK_WIDTH).to(DOT)
        if POSITIVES:
            other = _known_by(key_ids, key, keys[1], 0)
        z, t = _logits(students, teachers, k, key < keys[1], scale, PRECISION)
        y = tl.exp(t - teacher[0][:, None]) * (alpha / teacher[1])[:, None]
        if POSITIVES:
            y += tl.where(_same(own, other, key, keys[1]), share[:, None], 0.0)
        terms, slopes = focal(z - top[:, None] - log_total[:, None], gamma)
        weight = y * slopes
        loss += tl.sum(y * terms, 1)
        slope += tl.sum(weight, 1)
        if GRADIENT:
            before = highest
            highest = tl.maximum(before, tl.max(weight, 1))
            weight = (weight / highest[:, None]).to(FACTOR)
            total *= (before / highest)[:, None]
            total = tl.dot(weight, k.to(FACTOR), total, input_precision=FACTOR_PRECISION)
    return loss, slope, highest, total


@triton.jit
def second_stream(
    image, text, image_teacher, text_teacher, image_keys, text_keys, image_queue, text_queue,
    scale, alpha, gamma, ids, key_ids, queue_ids, statistics, terms, targets,
    rows, count, queue_count, width, first_row, tiles_of_split,
    query_row, teacher_row, keys_row, queue_row, queue_column,
    GRADIENT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    FACTOR: tl.constexpr, FACTOR_PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    split, splits, side, first_of_rows = _place(rows, BLOCK_ROWS)
    scale, alpha, gamma = tl.load(scale).to(tl.float32), tl.load(alpha).to(tl.float32), tl.load(gamma).to(tl.float32)
    row, column = first_of_rows + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    at = (split * 2 + side).to(tl.int64) * rows + row
    place, live = at[:, None] * width + column[None, :], (row < rows)[:, None] & (column < width)[None, :]
    student, teacher, _, _, counts = join(statistics, side, row, rows, splits, BLOCK_SPLITS)
    share = (1.0 - alpha) / tl.maximum(tl.sum(counts, 0), 1.0)
    own = _known_by(ids, row, rows, first_row)
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    keys = (_of_side(text_keys, image_keys, side), count, width, keys_row, 1)
    first, last = _tiles_of(split, tiles_of_split, count, queue_count, False, BLOCK_KEYS)
    if image_queue is not None:
        queue = (_of_side(text_queue, image_queue, side), queue_count, width, queue_row, queue_column)
        first_queued, last_queued = _tiles_of(split, tiles_of_split, count, queue_count, True, BLOCK_KEYS)
    if gamma == 0.0:
        found = tl.load(statistics + 6 * splits * 2 * rows + at, mask=row < rows, other=0.0)
        if GRADIENT and tl.max(found, 0) > 0.0:
            total = _positive_keys(
                total, own, keys, key_ids, first, last, DOT, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH
            )
            if queue_ids is not None:
                total = _positive_keys(
                    total, own, queue, queue_ids, first_queued, last_queued,
                    DOT, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
                )  # fmt: skip
            tl.store(targets + place, total * share[:, None], mask=live)
    else:
        students = (_of_side(image, text, side), rows, width, query_row, 1)
        students = rows_from(first_of_rows, students, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        teachers = (_of_side(image_teacher, text_teacher, side), rows, width, teacher_row, 1)
        teachers = rows_from(first_of_rows, teachers, BLOCK_ROWS, BLOCK_WIDTH).to(DOT)
        zero = tl.zeros([BLOCK_ROWS], tl.float32)
        sums = _focal_targets(
            (zero, zero, zero + LEAST, total), students, teachers, own, keys, key_ids, first, last,
            student, teacher, share, scale, alpha, gamma,
            True, GRADIENT, DOT, PRECISION, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
        )  # fmt: skip
        if image_queue is not None:
            sums = _focal_targets(
                sums, students, teachers, own, queue, queue_ids, first_queued, last_queued,
                student, teacher, share, scale, alpha, gamma,
                queue_ids is not None, GRADIENT, DOT, PRECISION, FACTOR, FACTOR_PRECISION, BLOCK_KEYS, BLOCK_WIDTH,
            )  # fmt: skip
        tl.store(terms + at, sums[0], mask=row < rows)
        tl.store(terms + splits * 2 * rows + at, sums[1], mask=row < rows)
        if GRADIENT:
            tl.store(targets + place, sums[3] * sums[2][:, None], mask=live)
