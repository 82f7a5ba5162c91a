"""momentum_contrastive_loss by kernels: csrc/cpu/momentum_contrastive.cpp and kernels/momentum_contrastive.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask import reference
from softmask.ops import _library


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
    tensors = (image, text, image_teacher.detach(), text_teacher.detach())
    image, text, image_teacher, text_teacher = _library.of_one_type(*tensors)
    image_keys = image_teacher if all_image_teacher is None else all_image_teacher.detach()
    text_keys = text_teacher if all_text_teacher is None else all_text_teacher.detach()
    image_queue, text_queue = (None if queue is None else queue.detach() for queue in (image_queue, text_queue))
    scalars = tuple(_library.scalar(value, like=image) for value in (logit_scale, alpha, gamma))
    positives = (ids, ids if all_ids is None else all_ids, queue_ids, first_row)
    with_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (image, text, scalars[0]))
    options = (*scalars, *positives, with_gradient)
    if backend == "triton":
        teachers, queues = (image_teacher, text_teacher), (image_queue, text_queue)
        loss, *_ = _KERNELS[backend](image, text, *teachers, image_keys, text_keys, *queues, *options)
        return reference.reduce(loss, reduction)
    of_image, _ = _KERNELS[backend](image, image_teacher, text_keys, text_queue, *options)
    of_text, _ = _KERNELS[backend](text, text_teacher, image_keys, image_queue, *options)
    return reference.reduce(0.5 * (of_image + of_text), reduction)


def _fake(
    query: Tensor,
    teacher: Tensor,
    keys: Tensor,
    queue: Tensor | None,
    scale: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    first_row: int,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    dtype = _library.compute_dtype(query)
    gradients = query.new_empty(query.shape if gradient else (0,), dtype=dtype)
    return query.new_empty((query.shape[0],), dtype=dtype), gradients


def _keep(ctx, inputs: tuple, found: tuple[Tensor, ...]) -> None:
    """For the backward: what the forward found for it or, where it was called without `gradient`, its inputs.

    A graph that was traced or exported with inputs that take no gradient is so called, and may get others later.
    """
    *tensors, ctx.first_row, ctx.found = inputs
    _library.keep(ctx, *(found if ctx.found else tensors))


def _found(ctx, backend: str, select: Callable[[tuple, tuple], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What backward takes; by running the forward again where it did not find it."""
    if ctx.found:
        return ctx.saved_tensors
    return select(ctx.saved_tensors, _KERNELS[backend](*ctx.saved_tensors, ctx.first_row, True))


def _of_one_side(inputs: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0], inputs[4], output[1]


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _keep(ctx, inputs, _of_one_side(inputs, output))


def _backward(ctx, run: Callable, grad: Tensor, _grad_gradients: Tensor) -> tuple[Tensor | None, ...]:
    query_grad, scale_grad = run(grad, *_found(ctx, "cpp", _of_one_side))
    return _library.wanted(ctx, query_grad, None, None, None, scale_grad, *(None,) * 7)


def _backward_fake(grad: Tensor, query: Tensor, scale: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), scale.new_empty(())


def _both_fake(
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
    rows, fp32 = image.shape[:1], {"dtype": torch.float32}
    gradients = (image.new_empty(image.shape if gradient else (0,), **fp32) for _ in range(2))
    return image.new_empty(rows, **fp32), image.new_empty(rows, **fp32), *gradients


def _of_both_sides(inputs: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return inputs[0], inputs[8], *output[1:]


def _both_setup(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _keep(ctx, inputs, _of_both_sides(inputs, output))


def _both_backward(ctx, run: Callable, grad: Tensor, *_grad_gradients: Tensor) -> tuple[Tensor | None, ...]:
    image_grad, text_grad, scale_grad = run(grad, *_found(ctx, "triton", _of_both_sides))
    return _library.wanted(ctx, image_grad, text_grad, *(None,) * 6, scale_grad, *(None,) * 7)


def _both_backward_fake(
    grad: Tensor, image: Tensor, scale: Tensor, at_scale: Tensor, image_gradients: Tensor, text_gradients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return image.new_empty(image.shape), image.new_empty(image.shape), scale.new_empty(())


def _flops(query: torch.Size, teacher: torch.Size, keys: torch.Size, queue: torch.Size | None, *options: object) -> int:
    """Logits of student and teacher and, where it is found, the gradient's product."""
    count = keys[0] + (0 if queue is None else queue[0])
    return 2 * query.numel() * count * (3 if options[-1] else 2)


def _both_flops(image: torch.Size, *options: object) -> int:
    return 2 * _flops(image, image, options[3], options[5], options[-1])


_KERNELS = _library.register(
    "momentum_contrastive",
    fake=_fake,
    setup=_setup,
    backward=_backward,
    backward_fake=_backward_fake,
    flops=_flops,
    backends=("cpp",),
    public_name="momentum_contrastive_loss",
) | _library.register(
    "momentum_contrastive",
    fake=_both_fake,
    setup=_both_setup,
    backward=_both_backward,
    backward_fake=_both_backward_fake,
    flops=_both_flops,
    backends=("triton",),
    public_name="momentum_contrastive_loss",
)
