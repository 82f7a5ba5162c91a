"""Text assignment, which ALBEF trains before NLVR2: whether a caption belongs to the left of two pictures, to the right
one or to neither."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from softmask.batch import Batch
from softmask.models.config import Distillation, SpecialIds
from softmask.models.distilled import Distilled, Loss, accuracy
from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import Packing
from softmask.models.layers.token_loss import masked_token_loss
from softmask.models.softmask_pp.backbone import ContrastiveEncoder, pooled_tokens
from softmask.models.softmask_pp.classifier import fused_first_tokens
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.masking import two_negatives
from softmask.models.softmask_pp.pairs import Prepared

PLACES = ("left", "right", "neither")


def have_others(ids: Tensor) -> Tensor:
    """Whether the batch has a picture of another image: ids [B] of the images -> bool [B]."""
    return (ids[:, None] != ids[None, :]).any(1)


def two_pictures(place: Tensor, wrong: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The left and the right picture [B] of every caption, whose own picture has its number.

    place [B], numbers of `PLACES`; `wrong`: two other pictures [B] of every caption.
    """
    own = torch.arange(len(place), device=place.device)
    first, second = wrong
    return torch.where(place == 0, own, first), torch.where(place == 1, own, torch.where(place == 0, first, second))


class TextAssignmentNetwork(ContrastiveEncoder):
    """The encoders, fusion layers in two copies, a linear layer on CLS, and pre-training's projections, which choose
    wrong pictures and stay as they are."""

    def __init__(self, config: SoftMaskPPConfig) -> None:
        super().__init__(config, pictures=2)
        width = config.text.width
        self.image_projection = nn.Linear(self.vision.width, config.embed_dim).requires_grad_(False)
        self.text_projection = nn.Linear(width, config.embed_dim).requires_grad_(False)
        self.assignment = nn.Linear(width, len(PLACES))
        for part in (self.text, self.fusion, self.image_projection, self.text_projection, self.assignment):
            initialize(part, std=config.text.initializer_range)


class TextAssignment(Distilled[TextAssignmentNetwork]):
    """The loss is the cross-entropy of a caption's place: a third of a batch each, wrong pictures are those of other
    images, drawn by their similarity. A caption whose batch has no other image does not count."""

    def __init__(self, config: SoftMaskPPConfig, head: object, *, special_ids: SpecialIds) -> None:
        super().__init__(config, TextAssignmentNetwork(config), Distillation(alpha=0.0))
        self.special_ids = special_ids

    def forward(self, batch: Batch) -> Loss:
        place = torch.randperm(len(batch.images), device=batch.images.device) % len(PLACES)
        logits = self._assign(
            batch.images, batch.input_ids, batch.attention_mask, ids=batch.image_id, place=place, draw=True
        )
        counted = have_others(batch.image_id).to(torch.float32)
        loss = masked_token_loss(at_least_fp32(logits), place, weight=counted) / counted.sum().clamp_min(1.0)
        return Loss(loss, {"accuracy": accuracy(logits, place)})

    @torch.no_grad()
    def predict(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, ids: Tensor, place: Tensor
    ) -> Tensor:
        """Probabilities [B, 3] fp32 of `PLACES`, where wrong pictures are the most similar ones. ids: of images."""
        logits = self._assign(images, input_ids, attention_mask, ids=ids, place=place, draw=False)
        return at_least_fp32(logits).softmax(1)

    def _assign(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, *, ids: Tensor, place: Tensor, draw: bool
    ) -> Tensor:
        """Logits [B, 3]."""
        network, packing = self.backbone, Packing.of(attention_mask)
        image_tokens, text_tokens = network.vision(images), network.text(input_ids, packing)
        with torch.no_grad():
            pooled = pooled_tokens(input_ids, attention_mask, self.special_ids, pool=self.config.text.pool)
            similarity = network.text_feature(text_tokens, packing, pooled) @ network.image_feature(image_tokens).T
            scale = 1.0 / (self.config.negative_temperature or self.config.temperature)
            turns = two_pictures(place, two_negatives(scale * similarity, ids, draw=draw))
        prepared = Prepared.of(network.fusion, image_tokens, text_tokens, packing)
        return network.assignment(fused_first_tokens(network.fusion, prepared, turns).states)
