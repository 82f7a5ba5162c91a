"""momentum_contrastive_loss by kernels: csrc/cpu/momentum_contrastive.cpp and kernels/momentum_contrastive.py."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask import reference
from softmask.ops import _library, _transforms
from softmask.ops._library import Context, Gradients


def momentum_contrastive_loss(
    backend: str,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    image_teacher: Tensor,
    text_teacher: Tensor,
    image_queue: Tensor | None,
    text_queue: Tensor | None,
    alpha: Tensor | float,
    gamma: Tensor | float,
    ids: Tensor | None,
    queue_ids: Tensor | None,
    all_image_teacher: Tensor | None = None,
    all_text_teacher: Tensor | None = None,
    all_ids: Tensor | None = None,
    first_row: int = 0,
    reduction: str,
) -> Tensor:
    dtype = _library.common_dtype(image, text, image_teacher, text_teacher)
    image, text = image.to(dtype), text.to(dtype)
    image_teacher, text_teacher = image_teacher.detach().to(dtype), text_teacher.detach().to(dtype)
    scale, alpha, gamma = (_library.scalar(value, like=image) for value in (logit_scale, alpha, gamma))
    loss, *_ = _KERNELS[backend](
        image,
        text,
        image_teacher,
        text_teacher,
        image_teacher if all_image_teacher is None else all_image_teacher.detach(),
        text_teacher if all_text_teacher is None else all_text_teacher.detach(),
        None if image_queue is None else image_queue.detach(),
        None if text_queue is None else text_queue.detach(),
        scale,
        alpha,
        gamma,
        ids,
        ids if all_ids is None else all_ids,
        queue_ids,
        first_row,
        _transforms.need_gradient((image, text, scale)),
    )
    return reference.reduce(loss, reduction)


def _fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, what a backend needs for the scale's gradient, and the gradients at scale * image and scale * text."""
    dtype = _library.compute_dtype(image)
    rows = image.new_empty(image.shape[:1], dtype=dtype)
    features = image.new_empty(image.shape if gradient else (0,), dtype=dtype)
    return rows, torch.empty_like(rows), features, torch.empty_like(features)


def _backward_fake(
    grad: Tensor,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    at_scale: Tensor,
    image_gradients: Tensor,
    text_gradients: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return image.new_empty(image.shape), text.new_empty(text.shape), scale.new_empty(())


def _setup(ctx: Context, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    """Keep the gradients that the forward pass computed or, if it was called without `gradient`, its inputs.

    A graph that was traced with inputs that need no gradient calls it so, and may later run with inputs that do.
    """
    *tensors, ctx.first_row, ctx.has_gradients = inputs
    _library.keep(ctx, *(_for_backward(inputs, output) if ctx.has_gradients else tensors))


def _for_backward(inputs: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    image, text, scale = inputs[0], inputs[1], inputs[8]
    return image, text, scale, *output[1:]


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor, *_grad_gradients: Tensor) -> Gradients:
    tensors = _library.kept(ctx)
    if not ctx.has_gradients:
        tensors = _for_backward(tensors, kernel.forward(*tensors, ctx.first_row, True))
    image_grad, text_grad, scale_grad = kernel.backward(grad, *tensors)
    return _library.wanted(ctx, image_grad, text_grad, *(None,) * 6, scale_grad, *(None,) * 7)


def _flops(
    image: torch.Size,
    text: torch.Size,
    image_teacher: torch.Size,
    text_teacher: torch.Size,
    image_keys: torch.Size,
    text_keys: torch.Size,
    image_queue: torch.Size | None,
    text_queue: torch.Size | None,
    *options: object,
) -> int:
    """Logits of student and teacher and, with `gradient`, the gradient's product; in both directions."""
    keys = text_keys[0] + (0 if text_queue is None else text_queue[0])
    return 2 * 2 * image.numel() * keys * (3 if options[-1] else 2)


_KERNELS = _library.register(
    "momentum_contrastive",
    fake=_fake,
    gradient=_library.Gradient(_setup, _backward, _backward_fake),
    flops=_flops,
    numbers=("scale", "alpha", "gamma"),
    public_name="momentum_contrastive_loss",
)
