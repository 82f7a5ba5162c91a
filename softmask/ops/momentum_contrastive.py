"""ALBEF's contrastive loss: momentum features and a queue as keys, soft targets, focal weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._distributed import OverRanks, check_alike, first_row, gather_rows_no_grad
from softmask.ops._fused import momentum_contrastive as fused
from softmask.ops._transforms import constant
from softmask.ops.contrastive import check_features

NO_ID = -1  # queue rows that are not filled yet or have no id


def momentum_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    image_teacher: Tensor,
    text_teacher: Tensor,
    image_queue: Tensor | None = None,
    text_queue: Tensor | None = None,
    alpha: Tensor | float = 0.4,
    gamma: Tensor | float = 0.0,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over rows and both directions of ``-sum_j y_j (1 - p_j)^gamma log p_j`` over the keys j,
    ``p = softmax(logit_scale * student @ keys^T)``, ``y = alpha * softmax(logit_scale * teacher @ keys^T)
    + (1 - alpha) * positives``. Image rows are compared with text keys and vice versa. The keys are the batch's
    teacher features followed by the queue.

    Args:
        image, text: [B, D], L2-normalized student features; fp32, fp16, bf16 or fp64.
        logit_scale: 1 / temperature of student and teacher; a float or a one-element tensor.
        image_teacher, text_teacher: [B, D], features of the momentum encoders, without gradient.
        image_queue, text_queue: [K, D], both or neither, any strides: ALBEF's [D, K] buffer is passed as ``queue.T``.
        alpha: weight of the soft targets, 0 to 1, a float or 0-dim tensor without gradient.
        gamma: focal exponent >= 0, a float or 0-dim tensor without gradient; 0 is exactly cross-entropy.
        ids: [B] int64; keys with the row's id share the positive mass. Without ids each sample is its only positive.
        queue_ids: [K] int64, ids of the queue's rows, -1 for rows without one; no sample may have the id -1. Without
            queue_ids no queue row is a positive. Requires ids.
        group: process group; the keys are then the teacher features of all ranks, followed by the queue. B must be
            equal on all ranks.
        reduction: "mean" or "sum" over the local rows, or "none" for [B], the mean of both directions.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), differentiable in image, text and logit_scale; 0 for an empty batch.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: ALBEF (arXiv 2107.07651), its public code; focal factor as in SoftMask++ (arXiv 2304.00719).
    """
    logit_scale, gamma = check_features(image, text, logit_scale, gamma=gamma, ids=ids, reduction=reduction)
    _check_keys(image, image_teacher, text_teacher, image_queue, text_queue)
    _check_queue_ids(image_queue, ids, queue_ids)
    all_image_teacher = all_text_teacher = all_ids = None
    if group is not None:
        check_alike("momentum_contrastive_loss", "image_teacher, text_teacher", group, image_teacher, ids, image, text)
        all_image_teacher, all_text_teacher = _gather_pair(image_teacher, text_teacher, group)
        all_ids = None if ids is None else gather_rows_no_grad(ids, group)
    return run(
        "momentum_contrastive_loss", reference.momentum_contrastive_loss, fused.momentum_contrastive_loss,
        image, text, logit_scale, floating=(image, text, image_teacher, text_teacher),
        image_teacher=constant(image_teacher), text_teacher=constant(text_teacher),
        image_queue=constant(image_queue), text_queue=constant(text_queue),
        alpha=constant(_checks.scalar("alpha", alpha, least=0, most=1)), gamma=gamma, ids=ids,
        queue_ids=queue_ids, all_image_teacher=all_image_teacher, all_text_teacher=all_text_teacher, all_ids=all_ids,
        first_row=0 if group is None else first_row(image, group), reduction=reduction,
    )  # fmt: skip


def _gather_pair(image: Tensor, text: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """One collective for both."""
    all_image, all_text = gather_rows_no_grad(torch.cat([image, text], -1), group).split(image.shape[1], -1)
    return all_image, all_text


def _check_keys(
    image: Tensor, image_teacher: Tensor, text_teacher: Tensor, image_queue: Tensor | None, text_queue: Tensor | None
) -> None:
    for name, teacher in (("image_teacher", image_teacher), ("text_teacher", text_teacher)):
        _checks.shape(name, teacher, tuple(image.shape))
        _checks.dtype(name, teacher)
    if (image_queue is None) != (text_queue is None):
        _checks.fail("image_queue, text_queue", "both or neither", "one")
    if image_queue is not None and text_queue is not None:
        _checks.shape("image_queue", image_queue, ("K", image.shape[1]))
        _checks.shape("text_queue", text_queue, tuple(image_queue.shape))
        _checks.dtype("image_queue", image_queue)
        _checks.dtype("text_queue", text_queue)
    _checks.device(
        image, image_teacher=image_teacher, text_teacher=text_teacher, image_queue=image_queue, text_queue=text_queue
    )


def _check_queue_ids(queue: Tensor | None, ids: Tensor | None, queue_ids: Tensor | None) -> None:
    if queue_ids is None:
        return
    if ids is None or queue is None:
        _checks.fail("queue_ids", "ids and queues beside it", "ids None" if ids is None else "no queues")
    _checks.shape("queue_ids", queue_ids, (len(queue),))
    _checks.dtype("queue_ids", queue_ids, (torch.int64,))
    _checks.device(queue, queue_ids=queue_ids)


class MomentumContrastiveLoss(OverRanks):
    """:func:`momentum_contrastive_loss` with its queue, kept in buffers: image_queue, text_queue [K, D] (initially
    random unit rows, equal on all ranks), queue_ids [K] and the 0-dim queue_pointer.

    Call :meth:`enqueue` after the backward pass, which reads the tensors that it overwrites.

    Args:
        feature_dim: D.
        queue_size: K; 0 = no queue.
        alpha, gamma, reduction, group: as in :func:`momentum_contrastive_loss`; forward may override alpha.
    """

    image_queue: Tensor
    text_queue: Tensor
    queue_ids: Tensor
    queue_pointer: Tensor

    def __init__(
        self,
        feature_dim: int,
        queue_size: int,
        *,
        alpha: float = 0.4,
        gamma: float = 0.0,
        group: dist.ProcessGroup | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(group)
        _checks.whole("feature_dim", feature_dim, least=1)
        _checks.whole("queue_size", queue_size, least=0)
        self.queue_size, self.alpha, self.gamma = queue_size, alpha, gamma
        self.reduction = reduction
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.empty(queue_size, feature_dim))
        self.register_buffer("queue_ids", torch.empty(queue_size, dtype=torch.int64))
        self.register_buffer("queue_pointer", torch.empty((), dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Refill the queue with its initial rows, equal on all devices and ranks."""
        generator = torch.Generator().manual_seed(0)
        for queue in (self.image_queue, self.text_queue):
            if not queue.is_meta:
                wide = torch.promote_types(queue.dtype, torch.float32)
                rows = torch.randn(queue.shape, generator=generator, dtype=wide, device="cpu")
                queue.copy_(F.normalize(rows, dim=-1))
        self.queue_ids.fill_(NO_ID)
        self.queue_pointer.zero_()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MomentumContrastiveLoss:
        """A queue created on "meta" is filled once it has memory; `to_empty` would leave it uninitialized."""
        had_none = self.queue_pointer.is_meta
        super()._apply(fn, recurse)
        if had_none and not self.queue_pointer.is_meta:
            self.reset_parameters()
        return self

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor | float,
        *,
        image_teacher: Tensor,
        text_teacher: Tensor,
        alpha: Tensor | float | None = None,
        ids: Tensor | None = None,
    ) -> Tensor:
        has_queue = self.queue_size > 0
        return momentum_contrastive_loss(
            image,
            text,
            logit_scale,
            image_teacher=image_teacher,
            text_teacher=text_teacher,
            image_queue=self.image_queue if has_queue else None,
            text_queue=self.text_queue if has_queue else None,
            alpha=self.alpha if alpha is None else alpha,
            gamma=self.gamma,
            ids=ids,
            queue_ids=self.queue_ids if has_queue and ids is not None else None,
            group=self.group,
            reduction=self.reduction,
        )

    @torch.no_grad()
    def enqueue(self, image_teacher: Tensor, text_teacher: Tensor, *, ids: Tensor | None = None) -> None:
        """Overwrite the oldest rows of the queue with the batch's teacher features [B, D] of all ranks.

        B summed over ranks may be at most K. Rows without ids are never positives. Writes in place, without host
        synchronization.
        """
        if self.queue_size == 0:
            return
        _checks.shape("image_teacher", image_teacher, ("B", self.image_queue.shape[1]))
        _checks.shape("text_teacher", text_teacher, tuple(image_teacher.shape))
        if ids is None:
            ids = self.queue_ids.new_full((len(image_teacher),), NO_ID)
        _checks.shape("ids", ids, (len(image_teacher),))
        _checks.dtype("ids", ids, (torch.int64,))
        for name, teacher in (("image_teacher", image_teacher), ("text_teacher", text_teacher)):
            _checks.dtype(name, teacher)
        _checks.device(self.image_queue, image_teacher=image_teacher, text_teacher=text_teacher, ids=ids)
        if self.group is not None:
            check_alike("enqueue", "image_teacher, text_teacher", self.group, image_teacher, ids, text_teacher)
            image_teacher, text_teacher = _gather_pair(image_teacher, text_teacher, self.group)
            ids = gather_rows_no_grad(ids, self.group)
        count = len(image_teacher)
        if count > self.queue_size:
            _checks.fail("image_teacher", f"at most queue_size = {self.queue_size} rows over all ranks", count)
        rows = (self.queue_pointer + torch.arange(count, device=self.queue_pointer.device)) % self.queue_size
        self.image_queue.index_copy_(0, rows, image_teacher.to(self.image_queue.dtype))
        self.text_queue.index_copy_(0, rows, text_teacher.to(self.text_queue.dtype))
        self.queue_ids.index_copy_(0, rows, ids)
        self.queue_pointer.add_(count).remainder_(self.queue_size)

    def extra_repr(self) -> str:
        return f"queue_size={self.queue_size}, alpha={self.alpha}, gamma={self.gamma}, reduction={self.reduction!r}"
