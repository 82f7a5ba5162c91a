"""focal_contrastive_loss by kernels: csrc/cpu/contrastive.cpp and kernels/contrastive.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from softmask import reference
from softmask.ops import _library


def focal_contrastive_loss(
    backend: str,
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    gamma: Tensor | float,
    ids: Tensor | None,
    all_image: Tensor | None = None,
    all_text: Tensor | None = None,
    all_ids: Tensor | None = None,
    first_row: int = 0,
    reduction: str,
) -> Tensor:
    image, text, all_image, all_text = _library.of_one_type(image, text, all_image, all_text)
    options = (_library.scalar(logit_scale, like=image), _library.scalar(gamma, like=image), ids)
    if all_image is None:
        loss, _ = _KERNELS[backend](image, text, *options, ids, 0, True)
    else:
        of_image, _ = _KERNELS[backend](image, all_text, *options, all_ids, first_row, False)
        of_text, _ = _KERNELS[backend](text, all_image, *options, all_ids, first_row, False)
        loss = 0.5 * (of_image + of_text)
    return reference.reduce(loss, reduction)


def _fake(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    gamma: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor]:
    count, dtype = rows.shape[0], _library.compute_dtype(rows)
    return rows.new_empty((count,), dtype=dtype), rows.new_empty((6 if both else 3, count), dtype=dtype)


def _triton_fake(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    gamma: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor]:
    """One statistic more where there are ids: C++ counts the positives again instead."""
    loss, statistics = _fake(rows, columns, scale, gamma, row_ids, column_ids, first_row, both)
    return loss, statistics.new_empty((statistics.shape[0] + (row_ids is not None), loss.shape[0]))


def _backward_fake(
    grad: Tensor,
    statistics: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    gamma: Tensor,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    first_row: int,
    both: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), columns.new_empty(columns.shape), scale.new_empty(())


def _setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.first_row, ctx.both = inputs
    _library.keep(ctx, output[1], *tensors)


def _backward(ctx, run: Callable, grad: Tensor, _grad_statistics: Tensor) -> tuple[Tensor | None, ...]:
    gradients = run(grad, *ctx.saved_tensors, ctx.first_row, ctx.both)
    return _library.wanted(ctx, *gradients, None, None, None, None, None)


def _flops(rows: torch.Size, columns: torch.Size, *_options: object) -> int:
    return 2 * rows.numel() * columns[0]


def _backward_flops(grad: torch.Size, statistics: torch.Size, rows: torch.Size, columns: torch.Size, *_: object) -> int:
    """The logits once more, and a product for the gradient of each side."""
    return 3 * _flops(rows, columns)


def _register(fake: Callable, backend: str) -> _library.Kernels:
    return _library.register(
        "contrastive",
        fake=fake,
        setup=_setup,
        backward=_backward,
        backward_fake=_backward_fake,
        flops=_flops,
        backward_flops=_backward_flops,
        public_name="focal_contrastive_loss",
        backends=(backend,),
    )


_KERNELS = _register(_fake, "cpp") | _register(_triton_fake, "triton")
