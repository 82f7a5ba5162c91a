"""masked_patch_loss by kernels: csrc/cpu/masked_patch_loss.cpp and kernels/masked_patch_loss.py."""

from __future__ import annotations

from torch import Tensor

from softmask import reference
from softmask.ops import _library
from softmask.ops._library import Context, Gradients


def masked_patch_loss(
    backend: str, prediction: Tensor, images: Tensor, mask: Tensor, *, patch_size: int, normalize: bool, reduction: str
) -> Tensor:
    loss = _KERNELS[backend](prediction, images.detach(), mask, patch_size, normalize)
    return reference.reduce(loss, reduction, count=mask.sum())


def _fake(prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool) -> Tensor:
    return prediction.new_empty(mask.shape, dtype=_library.compute_dtype(prediction, images))


def _backward_fake(
    grad: Tensor, prediction: Tensor, images: Tensor, mask: Tensor, patch_size: int, normalize: bool
) -> Tensor:
    return prediction.new_empty(prediction.shape)


def _setup(ctx: Context, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.normalize = inputs
    _library.keep(ctx, *tensors)


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor) -> Gradients:
    gradient = kernel.backward(grad, *_library.kept(ctx), ctx.patch_size, ctx.normalize)
    return gradient, None, None, None, None


_KERNELS = _library.register(
    "masked_patch_loss", fake=_fake, gradient=_library.Gradient(_setup, _backward, _backward_fake)
)
