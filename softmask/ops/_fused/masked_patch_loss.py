"""masked_patch_loss by kernels: csrc/cpu/masked_patch_loss.cpp and kernels/masked_patch_loss.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask import reference
from softmask.ops import _library


def masked_patch_loss(
    backend: str, prediction: Tensor, images: Tensor, mask: Tensor, *, patch_size: int, normalize: bool, reduction: str
) -> Tensor:
    loss = _KERNELS[backend](prediction, images.detach(), mask, patch_size, normalize)
    return reference.reduce(loss, reduction, count=mask.sum())


def _fake(prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool) -> Tensor:
    dtype = torch.float64 if torch.float64 in (prediction.dtype, images.dtype) else torch.float32
    return prediction.new_empty(mask.shape, dtype=dtype)


def _backward_fake(
    grad: Tensor, prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.normalize = inputs
    _library.keep(ctx, *tensors)


def _backward(ctx, run: Callable, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    options = (ctx.patch_size, ctx.normalize)
    return run(grad, *ctx.saved_tensors, *options), None, None, None, None


_KERNELS = _library.register(
    "masked_patch_loss",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    backward_fake=_backward_fake,
)
