"""Image classification on the image encoder of either method: a linear layer on the pooled image token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.batch import LabeledBatch
from softmask.models.config import ClassificationHead, Distillation, SpecialIds
from softmask.models.distilled import Distilled, Loss, Network, accuracy
from softmask.models.layers.numerics import at_least_fp32
from softmask.models.layers.pooler import AttentionalPooler
from softmask.models.layers.vision import VisionEncoder


class ImageNetwork(Network):
    """images [B, 3, S, S] -> logits [B, classes]. CoCa's pooler, if the method has it, pools the tokens."""

    def __init__(self, config: Any, *, classes: int) -> None:
        super().__init__()
        self.vision = VisionEncoder(config.vision)
        self.pooler: AttentionalPooler | None = None
        if queries := getattr(config, "pooler_queries", 0):
            self.pooler = AttentionalPooler(
                self.vision.width, config.pooler_heads, queries=queries, library=config.text.attention
            )
        self.head = nn.Linear(self.vision.width, classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.vision(images)
        return self.head(self.vision.pool(tokens) if self.pooler is None else self.pooler(tokens)[:, 0])


class ImageClassifier(Distilled[ImageNetwork]):
    """The loss is the cross-entropy with smoothed labels and, in training, images mixed by mixup or cutmix. It has no
    momentum copy.

    Raises:
        ValueError: fewer than two classes.
    """

    def __init__(self, config: Any, head: ClassificationHead, *, special_ids: SpecialIds) -> None:
        if len(head.names) < 2:
            raise ValueError(f"head.names: expected the names of at least two classes, got {head.names}")
        super().__init__(config, ImageNetwork(config, classes=len(head.names)), Distillation(alpha=0.0))
        self.head_config = head
        self._mix = _mixing(head) if head.mixup or head.cutmix else None

    def forward(self, batch: LabeledBatch) -> Loss:
        assert batch.labels is not None
        images, labels = batch.images, batch.labels
        options = self.head_config
        smoothed = (1 - options.smoothing) * F.one_hot(labels, len(options.names)) + options.smoothing / len(
            options.names
        )
        targets = smoothed
        if self._mix is not None and self.training:
            pairs = len(images) // 2 * 2  # timm mixes pairs
            mixed, of_two = self._mix(images[:pairs].clone(), labels[:pairs])
            images, targets = torch.cat([mixed, images[pairs:]]), torch.cat([of_two, smoothed[pairs:]])
        logits = at_least_fp32(self.backbone(images))
        loss = F.cross_entropy(logits, targets.to(logits.dtype))
        return Loss(loss, {"accuracy": accuracy(logits, labels)})

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """Probabilities [B, classes] fp32."""
        return at_least_fp32(self.backbone(images)).softmax(1)


def _mixing(head: ClassificationHead) -> Any:
    """timm's mixup and cutmix, drawn from NumPy's random state, which the trainer sets in every step."""
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=head.mixup, cutmix_alpha=head.cutmix, label_smoothing=head.smoothing, num_classes=len(head.names)
    )
