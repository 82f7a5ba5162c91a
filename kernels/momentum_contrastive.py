"""momentum_contrastive_loss: both directions at once, keys read where they lie, logits one tile at a time.

The keys are split between programs; each holds a tile of student rows and of teacher rows and multiplies both with its
share of the batch's keys and of the queue. As in flash attention the first launch keeps the statistics of both
softmaxes and the mean key under the student's, a part of the gradient; at gamma 0 also the mean key under the
teacher's, and has then read all keys for the only time. The second launch adds up the keys under the rest of the
gradient: at gamma 0 the positives, found by their ids alone, at other gammas the focal targets of a second stream. The
third adds up the splits, in fixed order. Backward scales what the forward found.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, config, dots, last_contiguous, launch
from softmask.kernels.momentum_contrastive_streams import (
    STATISTICS,
    by_split,
    first_stream,
    join,
    second_stream,
    tile_of,
)

WIDEST = 512  # features that are multiplied as a whole; wider ones by parts of WIDTH
WIDTH = 256
MIN_BLOCK = 16  # of a product

# BLOCK_KEYS of types of two bytes; larger ones have half as many, and a stage less. PROGRAMS: one per multiprocessor,
# whose registers it fills.
STREAM: Configs = {
    0: {"BLOCK_ROWS": 64, "BLOCK_KEYS": 512, "PROGRAMS": 4, "num_stages": 1},
    80: {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "PROGRAMS": 108, "num_warps": 8, "num_stages": 3},
    90: {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "PROGRAMS": 132, "num_warps": 8, "num_stages": 3},
    100: {"BLOCK_ROWS": 32, "BLOCK_KEYS": 32, "PROGRAMS": 148, "num_warps": 8, "num_stages": 3},
}
# ELEMENTS: of the sums of all splits, at a time.
FINISH: Configs = {
    0: {"BLOCK_ROWS": 64, "ELEMENTS": 1 << 20},
    80: {"BLOCK_ROWS": 1, "ELEMENTS": 4096, "num_warps": 4, "num_stages": 1},
}
BACKWARD: Configs = {0: {"BLOCK_ROWS": 64}, 80: {"BLOCK_ROWS": 4, "num_warps": 4, "num_stages": 1}}


@triton.jit
def _sum_of_splits(sums, weights, side, row, column, rows, width, splits, BLOCK_SPLITS: tl.constexpr):
    """sums [splits, 2, rows, width] under weights [BLOCK_SPLITS, BLOCK_ROWS], read where these are not 0."""
    split = tl.arange(0, BLOCK_SPLITS)
    at = (split[:, None] * 2 + side).to(tl.int64) * rows + row[None, :]
    live = (split < splits)[:, None] & (row < rows)[None, :] & (weights != 0.0)
    live = live[:, :, None] & (column < width)[None, None, :]
    part = tl.load(sums + at[:, :, None] * width + column[None, None, :], mask=live, other=0.0)
    return tl.sum(part * weights[:, :, None], 0)


@triton.jit
def _finish(
    statistics, terms, means, teacher_means, targets, alpha, gamma, loss, image_gradients, text_gradients,
    rows, width, splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = (row < rows)[:, None] & (column < width)[None, :]
    alpha, gamma = tl.load(alpha).to(tl.float32), tl.load(gamma).to(tl.float32)
    losses = tl.zeros([BLOCK_ROWS], tl.float32)
    for side in tl.static_range(2):
        student, teacher, cross, positive, counts = join(statistics, side, row, rows, splits, BLOCK_SPLITS)
        if gamma == 0.0:
            hard = positive / tl.maximum(tl.sum(counts, 0), 1.0) - student[0]
            of_side = tl.log(student[1]) - alpha * cross - (1.0 - alpha) * hard
            slope = tl.full([BLOCK_ROWS], 1.0, tl.float32)
        else:
            of_side = tl.sum(by_split(terms, 0, 0.0, side, row, rows, splits, BLOCK_SPLITS), 0)
            slope = tl.sum(by_split(terms, 1, 0.0, side, row, rows, splits, BLOCK_SPLITS), 0)
            counts = tl.full([BLOCK_SPLITS, BLOCK_ROWS], 1.0, tl.float32)  # every split has targets
        losses += 0.5 * of_side
        if means is not None:
            mean = _sum_of_splits(means, student[2], side, row, column, rows, width, splits, BLOCK_SPLITS)
            has = tl.where(counts > 0.0, 1.0, 0.0)
            target = _sum_of_splits(targets, has, side, row, column, rows, width, splits, BLOCK_SPLITS)
            if gamma == 0.0:
                target += alpha * _sum_of_splits(
                    teacher_means, teacher[2], side, row, column, rows, width, splits, BLOCK_SPLITS
                )
            gradients = image_gradients if side == 0 else text_gradients
            place = row[:, None].to(tl.int64) * width + column[None, :]
            tl.store(gradients + place, slope[:, None] * mean - target, mask=live)
    if tl.program_id(1) == 0:
        tl.store(loss + row, losses, mask=row < rows)


@triton.jit
def _backward(
    grad, image, text, scale, image_gradients, text_gradients, image_grad, text_grad, at_scale,
    rows, width, grad_row, query_row,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_ROWS
    row, column = first + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    live = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None].to(tl.int64) * width + column[None, :]
    upstream = 0.5 * tl.load(grad + row * grad_row, mask=row < rows, other=0.0).to(tl.float32)
    scale = tl.load(scale).to(tl.float32)
    for side in tl.static_range(2):
        query = image if side == 0 else text
        gradients = image_gradients if side == 0 else text_gradients
        out = image_grad if side == 0 else text_grad
        gradient = tl.load(gradients + place, mask=live, other=0.0) * upstream[:, None]
        tl.store(out + place, gradient * scale, mask=live)
        x = tile_of(query, first, rows, 0, width, query_row, 1, BLOCK_ROWS, BLOCK_WIDTH).to(tl.float32)
        tl.store(at_scale + side * rows + row, tl.sum(gradient * x, 1), mask=row < rows)


def _alike(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Of equal strides: copies where they differ."""
    return (image, text) if image.stride() == text.stride() else (image.contiguous(), text.contiguous())


def _rows(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _alike(last_contiguous(image), last_contiguous(text))


def _as_queue(keys: Tensor, queue: Tensor) -> Tensor:
    """Keys of the batch, few, as those of the queue: of their type, and neighbours in memory where they are."""
    keys = keys.to(queue.dtype)
    return keys.T.contiguous().T if queue.stride(0) == 1 and queue.stride(1) != 1 else keys


def _types(*tensors: Tensor) -> dict[str, Any]:
    """Of the products, and of those with computed factors, small ones of which fp16 would make 0."""
    chosen = dots(*tensors)
    half = chosen["DOT"] == tl.float16
    chosen["FACTOR"] = tl.float32 if half else chosen["DOT"]
    chosen["FACTOR_PRECISION"] = "tf32" if half else chosen["PRECISION"]
    return chosen


def _blocks(width: int, *tensors: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of programs wanted, and the constants, num_warps and num_stages of both streams."""
    options = config(STREAM, tensors[0])
    options["WIDE"] = width > WIDEST
    options["BLOCK_WIDTH"] = WIDTH if options["WIDE"] else max(triton.next_power_of_2(width), MIN_BLOCK)
    if options["BLOCK_WIDTH"] > WIDTH:
        options["BLOCK_ROWS"] //= 2
        options["BLOCK_KEYS"] //= 2
        options["num_warps"] = 16
    if {tensor.dtype for tensor in tensors} not in ({torch.float16}, {torch.bfloat16}):
        options["BLOCK_KEYS"] = max(options["BLOCK_KEYS"] // 2, MIN_BLOCK)
        options["num_stages"] = max(options["num_stages"] - 1, 1)
    return options.pop("PROGRAMS"), options


def forward(
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    image_queue: Tensor | None,
    text_queue: Tensor | None,
    scale: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    first_row: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [B], the mean of both directions; the gradients of each direction's at scale * image and scale * text,
    [B, D], or nothing without gradient."""
    image, text = _rows(image, text)
    image_teacher, text_teacher = _rows(image_teacher, text_teacher)
    image_keys, text_keys = _rows(image_keys, text_keys)
    queue_count, queue_strides = 0, (0, 0)
    if image_queue is not None and text_queue is not None:
        image_queue, text_queue = _alike(image_queue, text_queue)
        queue_count, queue_strides = image_queue.shape[0], image_queue.stride()
        image_keys, text_keys = _as_queue(image_keys, image_queue), _as_queue(text_keys, text_queue)
    rows, width = image.shape
    programs, options = _blocks(width, image, image_keys)
    blocks = triton.cdiv(rows, options["BLOCK_ROWS"])
    tiles = sum(triton.cdiv(count, options["BLOCK_KEYS"]) for count in (len(image_keys), queue_count))
    tiles_of_split = max(triton.cdiv(tiles, max(programs // max(2 * blocks, 1), 1)), 1)
    splits = triton.cdiv(tiles, tiles_of_split)
    block_splits = triton.next_power_of_2(max(splits, 1))
    statistics = _fp32(image, STATISTICS.value, splits, 2, rows)
    terms = _fp32(image, 2, splits, 2, rows)
    sums = [_fp32(image, splits, 2, rows, width) if gradient else None for _ in range(3)]
    gradients = [_fp32(image, rows, width) if gradient else None for _ in range(2)]
    loss = _fp32(image, rows)
    tensors = (image, text, image_teacher, text_teacher, image_keys, text_keys, image_queue, text_queue)
    sizes = (rows, len(image_keys), queue_count, width, first_row, tiles, tiles_of_split)
    strides = (image.stride(0), image_teacher.stride(0), *image_keys.stride(), *queue_strides)
    options |= {"GRADIENT": gradient} | _types(image, image_keys)
    grid = (splits * 2 * blocks, triton.cdiv(width, options["BLOCK_WIDTH"]) if gradient else 1)
    launch(
        first_stream, grid, *tensors, scale, gamma, ids, key_ids, queue_ids,
        statistics, sums[0], sums[1], *sizes, *strides, **options,
    )  # fmt: skip
    launch(
        second_stream, grid, *tensors, scale, alpha, gamma, ids, key_ids, queue_ids,
        statistics, terms, sums[2], *sizes, *strides, BLOCK_SPLITS=block_splits, **options,
    )  # fmt: skip
    options = config(FINISH, image)
    elements = options.pop("ELEMENTS") // (block_splits * options["BLOCK_ROWS"])
    block_columns = min(triton.next_power_of_2(width), elements)
    launch(
        _finish, (triton.cdiv(rows, options["BLOCK_ROWS"]), triton.cdiv(width, block_columns) if gradient else 1),
        statistics, terms, *sums, alpha, gamma, loss, *gradients, rows, width, splits,
        BLOCK_COLUMNS=block_columns, BLOCK_SPLITS=block_splits, **options,
    )  # fmt: skip
    of_image, of_text = (_fp32(image, 0) if gradient is None else gradient for gradient in gradients)
    return loss, of_image, of_text


def backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, image_gradients: Tensor, text_gradients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    rows, width = image.shape
    image_grad, text_grad = image.new_empty(image.shape), text.new_empty(text.shape)
    at_scale = _fp32(image, 2, rows)
    image, text = _rows(image, text)
    options = config(BACKWARD, image)
    launch(
        _backward, (triton.cdiv(rows, options["BLOCK_ROWS"]),),
        grad, image, text, scale, image_gradients, text_gradients, image_grad, text_grad, at_scale,
        rows, width, grad.stride(0), image.stride(0),
        BLOCK_WIDTH=triton.next_power_of_2(width), **options,
    )  # fmt: skip
    return image_grad, text_grad, at_scale.sum().to(scale.dtype)


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
