"""What the models of tasks after pre-training share: a network with a head, and its momentum copy for soft targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from softmask.models.config import Distillation
from softmask.models.layers.momentum import momentum_encoder_of, update_momentum_encoder
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.softmask_pp.backbone import FusedEncoder
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import PairIndex
from softmask.models.softmask_pp.pairs import first_tokens

N = TypeVar("N", bound=FusedEncoder)


@dataclass
class Loss:
    """Output of a training step."""

    loss: Tensor
    terms: dict[str, Tensor]  # detached scalars


class Distilled(nn.Module, Generic[N]):
    """A network, `backbone`, and where `alpha` is above 0 its `momentum_encoder`."""

    def __init__(self, config: SoftMaskPPConfig, network: N, distillation: Distillation) -> None:
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


def fused_first_tokens(network: FusedEncoder, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last fused state [B, D] of every text's first token, CLS.

    images: [n B, ...], the n pictures of the first text, then those of the second; n is the network's.
    """
    packing, fusion = Packing.of(attention_mask), network.fusion
    start = fusion.start(network.text(input_ids, packing), packing)
    first = torch.arange(0, len(images), fusion.copies, device=images.device)
    turns = [PairIndex(kv_index=first + number) for number in range(fusion.copies)]
    outputs = OutputPositions.of(packing, first_tokens(attention_mask), size=len(input_ids), longest=1)
    cls, _ = fusion(start, fusion.project(network.vision(images)), turns, outputs=outputs)
    return cls


def distilled_cross_entropy(logits: Tensor, labels: Tensor, *, teacher: Tensor | None, alpha: float) -> Tensor:
    """``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(teacher))``, mean over the rows of logits [B, C]."""
    return masked_token_loss(at_least_fp32(logits), labels, teacher=teacher, alpha=alpha) / max(len(labels), 1)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of rows whose largest logit is the label's, for the log."""
    return (logits.detach().argmax(1) == labels).to(torch.float32).mean()
