"""What the models of tasks after pre-training share: a network with a head, and its momentum copy for soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from softmask.models.config import Distillation
from softmask.models.layers.momentum import momentum_encoder_of, update_momentum_encoder
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.layers.vision import VisionEncoder


class Network(nn.Module):
    """An image encoder, `vision`, and whatever a task adds to it."""

    vision: VisionEncoder

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.vision.set_activation_checkpointing(enable)


N = TypeVar("N", bound=Network)


@dataclass
class Loss:
    """Output of a training step."""

    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars


class Distilled(nn.Module, Generic[N]):
    """A network, `backbone`, and where `alpha` is above 0 its `momentum_encoder`."""

    def __init__(self, config: Any, network: N, distillation: Distillation) -> None:
        super().__init__()
        self.config = config
        self.distillation = distillation
        self.backbone = network
        self.momentum_encoder = momentum_encoder_of(network) if distillation.alpha > 0 else None

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.vision.num_prefix_tokens

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.backbone.vision.patch_grid

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.backbone.set_activation_checkpointing(enable)

    def update_momentum(self) -> None:
        """Moves the momentum copy; once per optimizer step, before the forward pass."""
        if self.momentum_encoder is not None:
            update_momentum_encoder(self.momentum_encoder, self.backbone, self.distillation.momentum)

    def enqueue(self, output: Loss) -> None:
        """There is no queue."""

    def statistics(self) -> list[Tensor]:
        """Buffers that a forward pass in training changes: BatchNorm's running statistics."""
        momentum_encoder = [] if self.momentum_encoder is None else self.momentum_encoder.buffers()
        return [*self.backbone.buffers(), *momentum_encoder]


def distilled_cross_entropy(logits: Tensor, labels: Tensor, *, teacher: Tensor | None, alpha: float) -> Tensor:
    """``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``, mean over the rows of logits [B, C]."""
    return masked_token_loss(at_least_fp32(logits), labels, teacher=teacher, alpha=alpha) / max(len(labels), 1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose largest logit is the label's, for the log."""
    return (logits.detach().argmax(1) == labels).to(torch.float32).mean()
