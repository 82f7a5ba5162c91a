"""masked_patch_loss: the squared error at the pixels of masked patches, and its gradient; one launch each.

A program holds whole patches in registers, in the order of the prediction: rows, columns, channels. Predictions are
read, and gradients written, as contiguous runs; every image pixel is gathered from its place, so images are never
unfolded. Mean and variance are computed in registers too. Patches that are not masked read nothing. Backward recomputes
all of this, so only the inputs are saved.

Three neighbouring elements are three channels, so a warp's load from a planar image touches short runs in three rows
instead of one long run. The sectors are still used in full, by the same warp's next loads from L1, and memory moves no
more bytes. Going by channel would read images in wide runs, but predictions and, worse, written gradients with a stride
of three: each sector of the gradient would be written in three parts. Images in channels_last are long runs already.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from softmask.kernels._launch import Configs, cdiv, config, last_contiguous, launch, next_power_of_2, strides

EPS: tl.constexpr = tl.constexpr(1e-6)  # reference.PATCH_VARIANCE_EPS
# ELEMENTS: of a program's block, which holds as many patches as fit, at least one.
TABLE: Configs = {0: {"ELEMENTS": 16384}, 80: {"ELEMENTS": 2048, "num_stages": 1}}
ELEMENTS_PER_WARP, MIN_WARPS, MAX_WARPS = 512, 4, 16


@triton.jit
def _standardize(pixels, live, SIZE: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of each row [BLOCK_PATCHES, BLOCK_PIXELS], 0 where not live."""
    for _ in tl.static_range(2):  # twice: the mean's rounding error matters if the variance is near 0
        pixels = tl.where(live, pixels - (tl.sum(pixels, 1) / SIZE)[:, None], 0.0)
    return pixels * tl.rsqrt(tl.sum(pixels * pixels, 1) / (SIZE - 1) + EPS)[:, None]


@triton.jit
def _difference(
    prediction_ptr, images_ptr, masked, batch, patch, num_columns, prediction_strides, images_strides,
    NORMALIZE: tl.constexpr, SIDE: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    """prediction - target [BLOCK_PATCHES, BLOCK_PIXELS] of masked patches, 0 elsewhere."""
    stride_pb, stride_pp = prediction_strides
    stride_ib, stride_ic, stride_ih, stride_iw = images_strides
    pixel = tl.arange(0, BLOCK_PIXELS)
    live = masked[:, None] & (pixel < 3 * SIDE * SIDE)[None, :]
    start = batch * stride_pb + patch.to(tl.int64) * stride_pp
    prediction = tl.load(prediction_ptr + start[:, None] + pixel[None, :], mask=live, other=0.0).to(tl.float32)
    corner = batch * stride_ib
    corner += (patch // num_columns * SIDE).to(tl.int64) * stride_ih
    corner += (patch % num_columns * SIDE).to(tl.int64) * stride_iw
    place = (pixel // (3 * SIDE)).to(tl.int64) * stride_ih  # within the patch, [BLOCK_PIXELS]
    place += (pixel // 3 % SIDE).to(tl.int64) * stride_iw
    place += (pixel % 3).to(tl.int64) * stride_ic
    # Loaded as one row, neighbouring pixels go to neighbouring lanes. Triton gives all loads of one shape the same
    # layout, and a lane reads 16 bytes of the prediction at once.
    row: tl.constexpr = [live.shape[0] * BLOCK_PIXELS]
    pointers = images_ptr + tl.reshape(corner[:, None] + place[None, :], row)
    target = tl.load(pointers, mask=tl.reshape(live, row), other=0.0)
    target = tl.reshape(target, live.shape).to(tl.float32)
    if NORMALIZE:
        target = _standardize(target, live, 3 * SIDE * SIDE)
    return prediction - target


@triton.jit
def _fwd_kernel(
    prediction_ptr, images_ptr, mask_ptr, loss_ptr,
    num_total, num_patches, num_columns,
    prediction_strides, images_strides,
    NORMALIZE: tl.constexpr, SIDE: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)  # of the patch in the batch
    masked = tl.load(mask_ptr + index, mask=index < num_total, other=0) != 0
    difference = _difference(
        prediction_ptr, images_ptr, masked, (index // num_patches).to(tl.int64), index % num_patches, num_columns,
        prediction_strides, images_strides,
        NORMALIZE, SIDE, BLOCK_PIXELS,
    )  # fmt: skip
    tl.store(loss_ptr + index, tl.sum(difference * difference, 1) / (3 * SIDE * SIDE), mask=index < num_total)


@triton.jit
def _bwd_kernel(
    d_loss_ptr, prediction_ptr, images_ptr, mask_ptr, d_prediction_ptr,
    num_total, num_patches, num_columns,
    d_loss_strides, prediction_strides, images_strides,
    NORMALIZE: tl.constexpr, SIDE: tl.constexpr, BLOCK_PATCHES: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)  # of the patch in the batch
    masked = tl.load(mask_ptr + index, mask=index < num_total, other=0) != 0
    stride_lb, stride_lp = d_loss_strides
    batch, patch = (index // num_patches).to(tl.int64), index % num_patches
    difference = _difference(
        prediction_ptr, images_ptr, masked, batch, patch, num_columns, prediction_strides, images_strides,
        NORMALIZE, SIDE, BLOCK_PIXELS,
    )  # fmt: skip
    upstream = tl.load(d_loss_ptr + batch * stride_lb + patch * stride_lp, mask=masked, other=0.0).to(tl.float32)
    pixel = tl.arange(0, BLOCK_PIXELS)
    live = (index < num_total)[:, None] & (pixel < 3 * SIDE * SIDE)[None, :]
    place = index.to(tl.int64)[:, None] * (3 * SIDE * SIDE) + pixel[None, :]
    tl.store(d_prediction_ptr + place, difference * (upstream * (2.0 / (3 * SIDE * SIDE)))[:, None], mask=live)


def _blocks(prediction: Tensor, total: int, side: int, normalize: bool) -> tuple[int, dict[str, int]]:
    """Number of programs for all patches, and the constants of both kernels."""
    options = config(TABLE, prediction)
    pixels = next_power_of_2(3 * side**2)
    patches = max(options.pop("ELEMENTS") // pixels, 1)
    warps = min(max(patches * pixels // ELEMENTS_PER_WARP, MIN_WARPS), MAX_WARPS)
    options |= {"NORMALIZE": normalize, "SIDE": side, "BLOCK_PATCHES": patches, "BLOCK_PIXELS": pixels}
    return cdiv(total, patches), {"num_warps": warps, **options}


def forward(prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool) -> Tensor:
    """prediction [B, P, 3 * patch_size**2], images [B, 3, Hpx, Wpx], mask [B, P] -> loss [B, P], 0 where not masked."""
    loss = prediction.new_empty(mask.shape, dtype=torch.float32)
    prediction, mask = last_contiguous(prediction), mask.contiguous()
    programs, constants = _blocks(prediction, mask.numel(), patch_size, normalize)
    launch(
        _fwd_kernel, (programs,),
        prediction, images, mask, loss,
        mask.numel(), mask.shape[1], images.shape[3] // patch_size,
        strides(prediction, 2), strides(images, 4), **constants,
    )  # fmt: skip
    return loss


def backward(
    grad: Tensor, prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool
) -> Tensor:
    """The gradient of prediction, given that of the loss, grad [B, P]; 0 where not masked."""
    d_prediction = prediction.new_empty(prediction.shape)
    prediction, mask = last_contiguous(prediction), mask.contiguous()
    programs, constants = _blocks(prediction, mask.numel(), patch_size, normalize)
    launch(
        _bwd_kernel, (programs,),
        grad, prediction, images, mask, d_prediction,
        mask.numel(), mask.shape[1], images.shape[3] // patch_size,
        strides(grad, 2), strides(prediction, 2), strides(images, 4), **constants,
    )  # fmt: skip
    return d_prediction
