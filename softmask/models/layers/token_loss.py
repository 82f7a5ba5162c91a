"""Cross-entropy with hard labels and with the momentum encoder's soft targets, for MLM, answers and classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 64  # positions whose targets exist at the same time


def masked_token_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
    weight: Tensor | None = None,
) -> Tensor:
    """``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``, summed over M positions.

    logits [M, V] fp32 or fp64; labels [M] int64; teacher [M, V] of any type, the momentum encoder's logits, which get
    no gradient and are needed where alpha > 0; weight [M] of the positions, 1 by default. The backward pass keeps one
    [M, V] tensor, the gradient of the logits; targets and probabilities exist for `CHUNK` positions at a time.
    """
    return _SoftCrossEntropy.apply(logits, labels, teacher if alpha > 0 else None, alpha, weight)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, teacher: Tensor | None, alpha: float, weight: Tensor | None
    ) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        loss = logits.new_zeros(())
        for first in range(0, len(labels), CHUNK):
            rows = slice(first, first + CHUNK)
            target = torch.zeros_like(logits[rows])
            if teacher is not None:
                torch.softmax(teacher[rows].to(logits.dtype), dim=-1, out=target).mul_(alpha)
            hard = torch.full_like(target[:, :1], 1.0 - alpha)
            target.scatter_add_(1, labels[rows, None], hard)
            if weight is not None:
                target *= weight[rows, None]
            log_p = logits[rows].log_softmax(dim=-1)
            loss -= torch.dot(target.flatten(), log_p.flatten())
            if gradient is not None:
                p = log_p.exp_() if weight is None else log_p.exp_().mul_(weight[rows, None])
                torch.sub(p, target, out=gradient[rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_output, None, None, None, None
