"""Tasks whose answer is a class of the fused CLS: SNLI-VE of one picture and a sentence, NLVR2 of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from softmask.batch import LabeledBatch
from softmask.models.config import Distillation, SpecialIds
from softmask.models.distilled import Distilled, Loss, accuracy, distilled_cross_entropy
from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import OutputPositions, Packing
from softmask.models.softmask_pp.backbone import FusedEncoder
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import FusionEncoder, PairIndex
from softmask.models.softmask_pp.pairs import first_tokens


def fused_first_tokens(
    fusion: FusionEncoder, image_tokens: Tensor, text_tokens: Tensor, packing: Packing, turns: Sequence[Tensor]
) -> Tensor:
    """The last fused state [B, D] of every text's first token, CLS.

    image_tokens [I, P, D_image], text_tokens [S, D] of B texts; `turns`: the picture [B] that each text reads in the
    first copy of every layer, in the second, ...
    """
    mask = packing.mask
    start, keys = fusion.start(text_tokens, packing), fusion.project(image_tokens)
    outputs = OutputPositions.of(packing, first_tokens(mask), size=len(mask), longest=1)
    cls, _ = fusion(start, keys, [PairIndex(kv_index=turn) for turn in turns], outputs=outputs)
    return cls


class ClassifierNetwork(FusedEncoder):
    """The encoders, the fusion layers, and ALBEF's head of two layers."""

    def __init__(self, config: SoftMaskPPConfig, *, classes: int, pictures: int) -> None:
        super().__init__(config, pictures=pictures)
        width = config.text.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        for part in (self.text, self.fusion, self.head):
            initialize(part, std=config.text.initializer_range)

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, classes]. images: all pictures of the first text, then those of the second, ..."""
        packing, copies = Packing.of(attention_mask), self.fusion.copies
        turns = torch.arange(len(images), device=images.device).unflatten(0, (-1, copies)).unbind(1)
        texts = self.text(input_ids, packing)
        return self.head(fused_first_tokens(self.fusion, self.vision(images), texts, packing, turns))


class Classifier(Distilled[ClassifierNetwork]):
    """The loss is ``(1 - alpha) CE(logits, labels) + alpha CE(logits, softmax(momentum copy's logits))``."""

    classes: int
    pictures: int

    def __init__(self, config: SoftMaskPPConfig, head: Distillation, *, special_ids: SpecialIds) -> None:
        super().__init__(config, ClassifierNetwork(config, classes=self.classes, pictures=self.pictures), head)

    def forward(self, batch: LabeledBatch, *, alpha: float) -> Loss:
        assert batch.labels is not None
        inputs = batch.images, batch.input_ids, batch.attention_mask
        logits, teacher = self.backbone(*inputs), None
        if alpha > 0 and self.momentum_encoder is not None:
            with torch.no_grad():
                teacher = self.momentum_encoder(*inputs)
        loss = distilled_cross_entropy(logits, batch.labels, teacher=teacher, alpha=alpha)
        return Loss(loss, {"accuracy": accuracy(logits, batch.labels)})

    @torch.no_grad()
    def predict(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Probabilities [B, classes] fp32."""
        return at_least_fp32(self.backbone(images, input_ids, attention_mask)).softmax(1)


class SnliVe(Classifier):
    """SNLI-VE: entailment, neutral, contradiction."""

    classes = 3
    pictures = 1


class Nlvr2(Classifier):
    """NLVR2: a statement about a left and a right picture is false or true."""

    classes = 2
    pictures = 2
