"""Symmetric contrastive loss with focal weights and shared positives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from softmask import reference
from softmask.ops import _checks
from softmask.ops._backend import run
from softmask.ops._distributed import OverRanks, check_alike, first_row, gather_rows, gather_rows_no_grad
from softmask.ops._fused import contrastive as fused
from softmask.ops._transforms import constant


def focal_contrastive_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    gamma: Tensor | float = 0.0,
    ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Mean over rows and both directions of ``-sum_j y_j (1 - p_j)^gamma log p_j``,
    ``p = softmax(logit_scale * image @ text^T)``.

    Args:
        image, text: [B, D], L2-normalized rows; fp32, fp16, bf16 or fp64.
        logit_scale: 1 / temperature; a float or a one-element tensor.
        gamma: focal exponent >= 0, a float or 0-dim tensor without gradient; 0 is exactly cross-entropy.
        ids: [B] int64; rows with equal ids are positives of each other and share the target mass evenly.
        group: process group; the columns are then the features of all ranks, gathered with gradient. B must be equal
            on all ranks. Gradients are exact for the global batch once the engine averages them over ranks.
        reduction: "mean" or "sum" over the local rows, or "none" for [B], the mean of both directions.

    Returns:
        The loss, fp32 (fp64 for fp64 inputs), differentiable in image, text and logit_scale. An empty batch gives 0.

    Raises:
        ValueError: an argument is invalid; the message states what was expected and what was given.

    Source: CLIP (arXiv 2103.00020), focal factor of arXiv 1708.02002 as in SoftMask++ (arXiv 2304.00719).
    """
    logit_scale, gamma = check_features(image, text, logit_scale, gamma=gamma, ids=ids, reduction=reduction)
    all_image = all_text = all_ids = None
    if group is not None:
        check_alike("focal_contrastive_loss", "image, text", group, image, ids, text)
        # One collective gathers both.
        all_image, all_text = gather_rows(torch.cat([image, text], -1), group).split(image.shape[1], -1)
        all_ids = None if ids is None else gather_rows_no_grad(ids, group)
    return run(
        "focal_contrastive_loss",
        reference.focal_contrastive_loss,
        fused.focal_contrastive_loss,
        image,
        text,
        logit_scale,
        floating=(image, text),
        gamma=gamma,
        ids=ids,
        all_image=all_image,
        all_text=all_text,
        all_ids=all_ids,
        first_row=0 if group is None else first_row(image, group),
        reduction=reduction,
    )


def check_features(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor | float,
    *,
    gamma: Tensor | float,
    ids: Tensor | None,
    reduction: str,
) -> tuple[Tensor | float, Tensor | float]:
    """Check the arguments shared by both contrastive losses. Returns logit_scale and gamma ready for use."""
    _checks.shape("image", image, ("B", "D"), D="feature")
    _checks.shape("text", text, tuple(image.shape))
    _checks.dtype("image", image)
    _checks.dtype("text", text)
    _checks.device(image, text=text, ids=ids)
    if ids is not None:
        _checks.shape("ids", ids, (len(image),))
        _checks.dtype("ids", ids, (torch.int64,))
    _checks.one_of("reduction", reduction, _checks.REDUCTIONS)
    gamma = constant(_checks.scalar("gamma", gamma, least=0.0))
    return _checks.scalar("logit_scale", logit_scale, or_one_element=True), gamma


class FocalContrastiveLoss(OverRanks):
    """:func:`focal_contrastive_loss` as a layer without parameters. Copies share the group; saved files omit it."""

    def __init__(self, *, gamma: float = 0.0, group: dist.ProcessGroup | None = None, reduction: str = "mean") -> None:
        super().__init__(group)
        self.gamma, self.reduction = gamma, reduction

    def forward(self, image: Tensor, text: Tensor, logit_scale: Tensor | float, *, ids: Tensor | None = None) -> Tensor:
        return focal_contrastive_loss(
            image, text, logit_scale, gamma=self.gamma, ids=ids, group=self.group, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, reduction={self.reduction!r}"
