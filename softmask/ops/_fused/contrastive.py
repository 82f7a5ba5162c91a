"""focal_contrastive_loss by kernels: csrc/cpu/contrastive.cpp and kernels/contrastive.py."""

from __future__ import annotations

import torch
from torch import Tensor

from softmask import reference
from softmask.ops import _library
from softmask.ops._library import Context, Gradients


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
    kernel = _KERNELS[backend]
    dtype = _library.common_dtype(image, text, all_image, all_text)
    image, text = image.to(dtype), text.to(dtype)
    options = (_library.scalar(logit_scale, like=image), _library.scalar(gamma, like=image), ids)
    if all_image is None or all_text is None:
        loss, _ = kernel(image, text, *options, ids, 0, True)
    else:
        of_image, _ = kernel(image, all_text.to(dtype), *options, all_ids, first_row, False)
        of_text, _ = kernel(text, all_image.to(dtype), *options, all_ids, first_row, False)
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
    """Three statistics per row, the same per column if `both`; with ids one more: 1 / number of positives."""
    count, dtype = rows.shape[0], _library.compute_dtype(rows)
    statistics = (6 if both else 3) + (row_ids is not None)
    return rows.new_empty((count,), dtype=dtype), rows.new_empty((statistics, count), dtype=dtype)


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


def _setup(ctx: Context, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.first_row, ctx.both = inputs
    _library.keep(ctx, output[1], *tensors)


def _backward(ctx: Context, kernel: _library.Kernel, grad: Tensor, _grad_statistics: Tensor) -> Gradients:
    gradients = kernel.backward(grad, *_library.kept(ctx), ctx.first_row, ctx.both)
    return _library.wanted(ctx, *gradients, None, None, None, None, None)


def _flops(rows: torch.Size, columns: torch.Size, *_options: object) -> int:
    return 2 * rows.numel() * columns[0]


def _backward_flops(grad: torch.Size, statistics: torch.Size, rows: torch.Size, columns: torch.Size, *_: object) -> int:
    """The logits again, and one product for the gradient of each side."""
    return 3 * _flops(rows, columns)


_KERNELS = _library.register(
    "contrastive",
    fake=_fake,
    gradient=_library.Gradient(_setup, _backward, _backward_fake, _backward_flops),
    flops=_flops,
    numbers=("scale", "gamma"),
    public_name="focal_contrastive_loss",
)
