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
from softmask.models.softmask_pp.maps import Fused, MapOptions, maps_by_picture, without_graph
from softmask.models.softmask_pp.pairs import Prepared, first_tokens


def fused_first_tokens(
    fusion: FusionEncoder,
    prepared: Prepared,
    turns: Sequence[Tensor],
    *,
    record_layer: int | None = None,
) -> Fused:
    """The last fused state [B, D] of every text's first token, CLS, and what maps of its words need.

    `prepared`: B texts, and the keys of I pictures; `turns`: the picture [B] that each text reads in the first copy of
    every layer, in the second, ...
    """
    mask = prepared.start.packing.mask
    outputs = OutputPositions.of(prepared.start.packing, first_tokens(mask), size=len(mask), longest=1)
    pairs = [PairIndex(kv_index=turn) for turn in turns]
    cls, record = fusion(
        prepared.start, prepared.keys, pairs, outputs=outputs, record_layer=record_layer, grad_from=record_layer or 0
    )
    return Fused(cls, record, prepared.keys)


class ClassifierNetwork(FusedEncoder):
    """The encoders, the fusion layers, and ALBEF's head of two layers."""

    def __init__(self, config: SoftMaskPPConfig, *, classes: int, pictures: int) -> None:
        super().__init__(config, pictures=pictures)
        width = config.text.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
        for part in (self.text, self.fusion, self.head):
            initialize(part, std=config.text.initializer_range)

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, pictures: Tensor | None = None
    ) -> Tensor:
        """Logits [B, classes]. images: all pictures of the first text, then those of the second, ..., or any, of which
        `pictures` [B, n] names those of each text."""
        return self.head(self.fused(images, input_ids, attention_mask, pictures=pictures).states)

    def fused(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        pictures: Tensor | None = None,
        record_layer: int | None = None,
    ) -> Fused:
        """The texts' first tokens, and what maps of the words need."""
        packing, copies = Packing.of(attention_mask), self.fusion.copies
        with without_graph(record_layer is not None):
            texts, tokens = self.text(input_ids, packing), self.vision(images)
            prepared = Prepared.of(self.fusion, tokens, texts, packing)
        if pictures is None:
            pictures = torch.arange(len(images), device=images.device).unflatten(0, (-1, copies))
        return fused_first_tokens(self.fusion, prepared, pictures.unbind(1), record_layer=record_layer)


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
    def predict(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, pictures: Tensor | None = None
    ) -> Tensor:
        """Probabilities [B, classes] fp32."""
        return at_least_fp32(self.backbone(images, input_ids, attention_mask, pictures=pictures)).softmax(1)

    def word_maps_by_picture(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, word_index: Tensor, *, normalize: str | None
    ) -> Tensor:
        """Maps [B, pictures, W, patches] of the words at word_index [B, W, S] (token positions, -1 pads) over each
        picture: Grad-CAM of the largest logit. Works under no_grad and leaves every `.grad` untouched."""

        def fused(layer: int) -> tuple[Tensor, Fused]:
            found = self.backbone.fused(images, input_ids, attention_mask, record_layer=layer)
            return self.backbone.head(found.states).amax(1), found

        options = MapOptions(self.config.cam_layer, self.num_prefix_tokens, normalize)
        return maps_by_picture(fused, word_index, options, pictures=self.pictures)


class SnliVe(Classifier):
    """SNLI-VE: entailment, neutral, contradiction."""

    classes = 3
    pictures = 1


class Nlvr2(Classifier):
    """NLVR2: a statement about a left and a right picture is false or true."""

    classes = 2
    pictures = 2
