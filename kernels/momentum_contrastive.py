"""momentum_contrastive_loss: both directions at once; keys are read in place, and logits exist one tile at a time.

The keys are split between programs. Each holds a tile of student rows and one of teacher rows, and multiplies both with
its share of the batch's keys and of the queue. As in flash attention, the first launch computes the statistics of both
softmaxes and the mean key under the student's, a part of the gradient; at gamma 0 it also computes the mean key under
the teacher's, so that it is the only one to read all keys. The second launch sums the keys for the rest of the
gradient: at gamma 0 the positives, found by their ids alone; at other gammas the keys weighted by the focal targets, in
a second stream. The third launch sums the splits in a fixed order. Backward scales what forward computed.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import (
    Configs,
    cdiv,
    config,
    dots,
    factor_dots,
    last_contiguous,
    launch,
    next_power_of_2,
    strides,
    type_of,
)
from softmask.kernels._math import number
from softmask.kernels.momentum_contrastive_streams import (
    STATISTICS,
    TERMS,
    fwd_first_stream_kernel,
    fwd_second_stream_kernel,
    join,
    load_scale,
    places,
)

PART = 256  # of wide features, multiplied part by part
REGISTERS = 2048  # of a multiprocessor per lane, shared by its warps
MAX_REGISTERS = 255  # per thread
MIN_BLOCK = 16  # the smallest operand of tl.dot

# BLOCK_KEYS: for fp16; types of four bytes have half as many, and one stage fewer. BF16_KEYS: for bf16, whose factors
# need fewer registers than fp16's, with up to PART features; one stage fewer, too. WIDEST: features that a program
# holds at once; 86 and 120 have less shared memory. PROGRAMS: one per multiprocessor, whose registers it fills. FEWEST:
# tiles per program, so that it reads more keys than it writes sums.
STREAM: Configs = {
    0: {
        "BLOCK_ROWS": 64,
        "BLOCK_KEYS": 512,
        "BF16_KEYS": 512,
        "WIDEST": 512,
        "PROGRAMS": 4,
        "FEWEST": 1,
        "num_warps": 4,
        "num_stages": 1,
    },
    80: {
        "BLOCK_ROWS": 32,
        "BLOCK_KEYS": 32,
        "BF16_KEYS": 64,
        "WIDEST": 512,
        "PROGRAMS": 108,
        "FEWEST": 4,
        "num_warps": 8,
        "num_stages": 3,
    },
    86: {
        "BLOCK_ROWS": 16,
        "BLOCK_KEYS": 32,
        "BF16_KEYS": 32,
        "WIDEST": 256,
        "PROGRAMS": 84,
        "FEWEST": 4,
        "num_warps": 8,
        "num_stages": 3,
    },
}
STREAM |= {90: STREAM[80] | {"PROGRAMS": 132}, 100: STREAM[80] | {"PROGRAMS": 148}, 120: STREAM[86] | {"PROGRAMS": 170}}
# ELEMENTS: of the sums of all splits, at a time.
FINISH: Configs = {
    0: {"BLOCK_ROWS": 64, "ELEMENTS": 1 << 20},
    80: {"BLOCK_ROWS": 1, "ELEMENTS": 4096, "num_warps": 4, "num_stages": 1},
}
BACKWARD: Configs = {0: {"BLOCK_ROWS": 64}, 80: {"BLOCK_ROWS": 4, "num_warps": 4, "num_stages": 1}}


@triton.jit
def _sum_of_splits(sums_ptr, weights, at, live, column, width):
    """Sums over splits of sums [splits, 2, rows, width] times weights [BLOCK_SPLITS, BLOCK_ROWS]; reads none whose
    weight is 0."""
    live = (live & (weights != 0.0))[:, :, None] & (column < width)[None, None, :]
    place = at.to(tl.int64)[:, :, None] * width + column[None, None, :]
    return tl.sum(tl.load(sums_ptr + place, mask=live, other=0.0) * weights[:, :, None], 0)


@triton.jit
def _fwd_finish_kernel(
    statistics_ptr, terms_ptr, mean_ptr, teacher_mean_ptr, targets_ptr, scale, alpha, gamma,
    loss_ptr, d_scale_ptr, image_gradients_ptr, text_gradients_ptr,
    num_rows, width, num_splits,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    scale = load_scale(scale)
    alpha, gamma = number(alpha), number(gamma)
    of_row = tl.zeros([BLOCK_ROWS], tl.float32)
    slope_of_row = of_row
    for side in tl.static_range(2):
        at, live = places(side, row, num_rows, num_splits, BLOCK_SPLITS)
        student, teacher, positive, positives = join(statistics_ptr, at, live, row, num_rows, num_splits)
        if mean_ptr is not None:
            mean = _sum_of_splits(mean_ptr, student[2], at, live, column, width)
        if gamma == 0.0:
            hard = positive / tl.maximum(tl.sum(positives, 0), 1.0) - student[0]
            of_row += 0.5 * (tl.log(student[1]) - alpha * teacher[3] - (1.0 - alpha) * hard)
            slope_of_row += 0.5 * (alpha * (student[3] - teacher[3]) + (1.0 - alpha) * (student[3] - hard))
            if mean_ptr is not None:
                soft = _sum_of_splits(teacher_mean_ptr, teacher[2], at, live, column, width)
                has = tl.where(positives > 0.0, 1.0, 0.0)
                target = _sum_of_splits(targets_ptr, has, at, live, column, width)
                gradient = alpha * (mean - soft) + (1.0 - alpha) * (mean - target)  # 0 where these are equal
        else:
            step = num_splits * 2 * num_rows
            of_row += 0.5 * tl.sum(tl.load(terms_ptr + at, mask=live, other=0.0), 0)
            slope = tl.sum(tl.load(terms_ptr + step + at, mask=live, other=0.0), 0)
            spread = tl.sum(tl.load(terms_ptr + 2 * step + at, mask=live, other=0.0), 0)
            slope_of_row += 0.5 * (slope * student[3] - spread)
            if mean_ptr is not None:
                ones = tl.full([BLOCK_SPLITS, BLOCK_ROWS], 1.0, tl.float32)
                gradient = slope[:, None] * mean - _sum_of_splits(targets_ptr, ones, at, live, column, width)
        if mean_ptr is not None:
            gradients_ptr = image_gradients_ptr if side == 0 else text_gradients_ptr
            place = row[:, None].to(tl.int64) * width + column[None, :]
            tl.store(gradients_ptr + place, 0.5 * gradient, mask=(row < num_rows)[:, None] & (column < width)[None, :])
    if tl.program_id(1) == 0:
        tl.store(loss_ptr + row, of_row, mask=row < num_rows)
        tl.store(d_scale_ptr + row, slope_of_row / scale, mask=row < num_rows)


@triton.jit
def _bwd_kernel(
    d_loss_ptr, scale, at_scale_ptr, image_gradients_ptr, text_gradients_ptr,
    d_image_ptr, d_text_ptr, d_scale_ptr,
    num_rows, width, stride_lb,
    BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    live = (row < num_rows)[:, None] & (column < width)[None, :]
    place = row[:, None].to(tl.int64) * width + column[None, :]
    upstream = tl.load(d_loss_ptr + row * stride_lb, mask=row < num_rows, other=0.0).to(tl.float32)
    tl.store(
        d_scale_ptr + row, upstream * tl.load(at_scale_ptr + row, mask=row < num_rows, other=0.0), mask=row < num_rows
    )
    upstream *= number(scale)
    tl.store(
        d_image_ptr + place, tl.load(image_gradients_ptr + place, mask=live, other=0.0) * upstream[:, None], mask=live
    )
    tl.store(
        d_text_ptr + place, tl.load(text_gradients_ptr + place, mask=live, other=0.0) * upstream[:, None], mask=live
    )


def _alike(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors with equal strides: copies if theirs differ."""
    return (image, text) if image.stride() == text.stride() else (image.contiguous(), text.contiguous())


def _rows(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    return _alike(last_contiguous(image), last_contiguous(text))


def _keys(*given: Tensor | None) -> list[Tensor | None]:
    """Keys and queues of images and texts. Queues keep their layout. The batch's keys, which are few, are converted to
    the queues' type, if that is larger, and to their layout."""
    image_keys, text_keys, image_queue, text_queue = given
    common = reduce(torch.promote_types, (tensor.dtype for tensor in given if tensor is not None))
    image_keys, text_keys = _rows(image_keys.to(common), text_keys.to(common))
    if image_queue is not None:
        of_queues = torch.promote_types(image_queue.dtype, text_queue.dtype)
        image_queue, text_queue = _alike(image_queue.to(of_queues), text_queue.to(of_queues))
        if image_queue.stride(0) == 1 and image_queue.stride(1) != 1:
            image_keys, text_keys = image_keys.T.contiguous().T, text_keys.T.contiguous().T
    return [image_keys, text_keys, image_queue, text_queue]


def _types(*tensors: Tensor) -> dict[str, Any]:
    """Types of the products, and of those with computed factors."""
    factor = factor_dots(*tensors)
    return dots(*tensors) | {"FACTOR": factor["DOT"], "FACTOR_PRECISION": factor["PRECISION"]}


def _constants(width: int, queued: bool, *tensors: Tensor) -> tuple[int, int, dict[str, Any]]:
    """(programs wanted, fewest tiles for each, constants, num_warps and num_stages of both streams)."""
    options = config(STREAM, tensors[0]) | _types(*tensors)
    options["WIDTH"], options["WIDE"] = width, width > options.pop("WIDEST")
    options["BLOCK_WIDTH"] = PART if options["WIDE"] else max(next_power_of_2(width), MIN_BLOCK)
    bf16_keys = options.pop("BF16_KEYS")
    if {tensor.dtype for tensor in tensors} == {torch.bfloat16} and width <= PART and bf16_keys > options["BLOCK_KEYS"]:
        options |= {"BLOCK_KEYS": bf16_keys, "num_stages": options["num_stages"] - 1}
    if options["BLOCK_WIDTH"] > PART:
        options |= {"BLOCK_ROWS": options["BLOCK_ROWS"] // 2, "BLOCK_KEYS": options["BLOCK_KEYS"] // 2, "num_warps": 16}
    if {tensor.dtype for tensor in tensors} not in ({torch.float16}, {torch.bfloat16}):
        options["BLOCK_KEYS"] = max(options["BLOCK_KEYS"] // 2, MIN_BLOCK)
        options["num_stages"] = max(options["num_stages"] - 1, 1)
    if options["DOT"] == tl.float32 and options["PRECISION"] == "ieee":
        options["num_warps"] = 8  # with 16, a thread has too few registers for IEEE products
        # Loading the next keys ahead needs registers too: more than are left beside the masks of wide features or, on
        # sm_100, without a queue.
        masked = PART < width < options["BLOCK_WIDTH"]
        if masked or not (queued or options["WIDE"]):
            options["num_stages"] = 1
    options["maxnreg"] = min(REGISTERS // options["num_warps"], MAX_REGISTERS)
    return options.pop("PROGRAMS"), options.pop("FEWEST"), options


def _splits(tiles: int, blocks: int, programs: int, fewest_tiles: int) -> tuple[int, int]:
    """(tiles of keys per split, number of splits), for about `programs` programs in all."""
    tiles_of_split = max(cdiv(tiles, max(programs // max(2 * blocks, 1), 1)), fewest_tiles)
    return tiles_of_split, max(cdiv(tiles, tiles_of_split), 1)


def _finish_options(image: Tensor, width: int, block_splits: int) -> dict[str, int]:
    """Constants of the last launch, including BLOCK_COLUMNS."""
    options = config(FINISH, image)
    if width % 4:  # no vector loads: every load has its pointer and mask in registers
        options["num_warps"] = 8
    elements = options.pop("ELEMENTS") // (block_splits * options["BLOCK_ROWS"])
    return {**options, "BLOCK_COLUMNS": min(next_power_of_2(width), elements), "BLOCK_SPLITS": block_splits}


def forward(
    image: Tensor,
    text: Tensor,
    image_teacher: Tensor,
    text_teacher: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    image_queue: Tensor | None,
    text_queue: Tensor | None,
    scale: Tensor | float,
    alpha: Tensor | float,
    gamma: Tensor | float,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    first_row: int,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses [B], the means of both directions, and their derivatives [B] with respect to scale; with gradient, also
    those with respect to scale * image and scale * text, [B, D]."""
    image, text = _rows(image, text)
    image_teacher, text_teacher = _rows(image_teacher, text_teacher)
    keys = _keys(image_keys, text_keys, image_queue, text_queue)
    ids, key_ids, queue_ids = (None if one is None else one.contiguous() for one in (ids, key_ids, queue_ids))
    rows, width = image.shape
    count, queue_count = (0 if one is None else len(one) for one in keys[::2])
    typed = (image, *(one for one in keys[::2] if one is not None))
    programs, fewest_tiles, options = _constants(width, keys[2] is not None, *typed)
    blocks = cdiv(rows, options["BLOCK_ROWS"])
    tiles = sum(cdiv(number, options["BLOCK_KEYS"]) for number in (count, queue_count))
    tiles_of_split, splits = _splits(tiles, blocks, programs, fewest_tiles)
    block_splits = next_power_of_2(splits)
    statistics = _fp32(image, STATISTICS.value, splits, 2, rows)
    terms = _fp32(image, TERMS.value, splits, 2, rows)
    sums = [_fp32(image, splits, 2, rows, width) if gradient else None for _ in range(3)]
    gradients = [_fp32(image, rows, width) if gradient else None for _ in range(2)]
    loss, at_scale = _fp32(image, rows), _fp32(image, rows)
    tensors = (image, text, image_teacher, text_teacher, *keys)
    sizes = (rows, count, queue_count, first_row, tiles, tiles_of_split)
    all_strides = (image.stride(0), image_teacher.stride(0), *(strides(one, 2) for one in keys[::2]))
    options["GRADIENT"] = gradient
    grid = (splits * 2 * blocks, cdiv(width, options["BLOCK_WIDTH"]) if gradient else 1)
    launch(
        fwd_first_stream_kernel, grid, *tensors, scale, gamma, ids, key_ids, queue_ids,
        statistics, sums[0], sums[1], *sizes, *all_strides, **options,
    )  # fmt: skip
    launch(
        fwd_second_stream_kernel, grid, *tensors, scale, alpha, gamma, ids, key_ids, queue_ids,
        statistics, terms, sums[2], *sizes, *all_strides, BLOCK_SPLITS=block_splits, **options,
    )  # fmt: skip
    options = _finish_options(image, width, block_splits)
    columns = cdiv(width, options["BLOCK_COLUMNS"]) if gradient else 1
    grid = (cdiv(rows, options["BLOCK_ROWS"]), columns)
    launch(
        _fwd_finish_kernel, grid,
        statistics, terms, *sums, scale, alpha, gamma, loss, at_scale, *gradients, rows, width, splits, **options,
    )  # fmt: skip
    of_image, of_text = (_fp32(image, 0) if gradient is None else gradient for gradient in gradients)
    return loss, at_scale, of_image, of_text


def backward(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    at_scale: Tensor,
    image_gradients: Tensor,
    text_gradients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of image, text and scale."""
    rows, width = image.shape
    found = [tuple(one.shape) for one in (image_gradients, text_gradients)]
    if found != [(rows, width)] * 2:
        raise RuntimeError(
            "momentum_contrastive: a forward with gradient=False leaves nothing for backward: expected the gradients "
            f"that one with gradient=True returns, each {(rows, width)}, got {found[0]} and {found[1]}"
        )
    image_grad, text_grad, scale_grad = image.new_empty(image.shape), image.new_empty(image.shape), _fp32(image, rows)
    options = config(BACKWARD, image)
    launch(
        _bwd_kernel, (cdiv(rows, options["BLOCK_ROWS"]),),
        grad, scale, at_scale, image_gradients, text_gradients, image_grad, text_grad, scale_grad,
        rows, width, grad.stride(0), BLOCK_WIDTH=next_power_of_2(width), **options,
    )  # fmt: skip
    return image_grad, text_grad, scale_grad.sum(dtype=type_of(scale))


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
