"""Both encoders and the fusion layers; with the MLM head and the projections, the part that pre-training's momentum
encoder copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.config import SpecialIds, TextPool
from softmask.models.distilled import Network
from softmask.models.layers.bert import MLMHead, TextEncoder
from softmask.models.layers.bert_weights import load_bert
from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import Packing, is_cls_or_sep
from softmask.models.layers.vision import VisionEncoder
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.models.softmask_pp.fusion import FusionEncoder


@dataclass
class Encoded:
    """Tokens, [B, P, D] of images or [S, D] of packed captions, and L2-normalized features [B, embed_dim]."""

    tokens: Tensor
    feature: Tensor

    def detach(self) -> Encoded:
        return Encoded(self.tokens.detach(), self.feature.detach())


def pooled_tokens(input_ids: Tensor, mask: Tensor, special: SpecialIds, *, pool: TextPool) -> Tensor:
    """bool [B, T]: the tokens whose mean is a caption's feature, of those in `mask` [B, T]. With "words" CLS and SEP
    are not among them, unless a caption has no others."""
    if pool != "words":
        return mask
    words = mask & ~is_cls_or_sep(input_ids, special)
    return torch.where(words.any(1, keepdim=True), words, mask)


class FusedEncoder(Network):
    """Both encoders and the fusion layers, all that tasks after pre-training keep. Subclasses initialize them.

    `pictures`: how many a text reads, each by fusion layers of its own.
    """

    def __init__(self, config: SoftMaskPPConfig, *, pictures: int = 1) -> None:
        super().__init__()
        self.vision = VisionEncoder(config.vision)
        self.text = TextEncoder(config.text)
        self.fusion = FusionEncoder(config.text, image_width=self.vision.width, copies=pictures)

    def set_activation_checkpointing(self, enable: bool) -> None:
        super().set_activation_checkpointing(enable)
        self.text.activation_checkpointing = enable
        self.fusion.activation_checkpointing = enable


class ContrastiveEncoder(FusedEncoder):
    """Features of the contrastive loss. Subclasses make the projections."""

    image_projection: nn.Linear
    text_projection: nn.Linear

    def __init__(self, config: SoftMaskPPConfig, *, pictures: int = 1) -> None:
        super().__init__(config, pictures=pictures)
        self.text_pooling = config.text.pool

    def encode_image(self, images: Tensor) -> Encoded:
        tokens = self.vision(images)
        return Encoded(tokens, self.image_feature(tokens))

    def image_feature(self, tokens: Tensor) -> Tensor:
        """tokens [B, P, D] -> normalized features [B, embed_dim]."""
        return F.normalize(at_least_fp32(self.image_projection(self.vision.pool(tokens))), dim=-1)

    def text_feature(self, tokens: Tensor, packing: Packing, pooled: Tensor) -> Tensor:
        """tokens [S, D] of B captions -> normalized features [B, embed_dim] of their CLS tokens, or of the means of the
        tokens `pooled`, [B, T] bool."""
        if self.text_pooling == "cls":
            states = tokens[packing.cu_seqlens[:-1]]
        else:
            states = (packing.pad(tokens) * pooled[..., None]).sum(dim=1) / pooled.sum(dim=1, keepdim=True)
        return F.normalize(at_least_fp32(self.text_projection(states)), dim=-1)


class Backbone(ContrastiveEncoder):
    """With the projections and the MLM head."""

    def __init__(self, config: SoftMaskPPConfig) -> None:
        super().__init__(config)
        self.mlm_head = MLMHead(config.text)
        self.image_projection = nn.Linear(self.vision.width, config.embed_dim)
        self.text_projection = nn.Linear(config.text.width, config.embed_dim)
        for part in (self.text, self.fusion, self.mlm_head, self.image_projection, self.text_projection):
            initialize(part, std=config.text.initializer_range)
        self.text_from = load_bert(self, config.text.checkpoint) if config.text.checkpoint else "random"

    def predict_tokens(self, states: Tensor) -> Tensor:
        """Fused states of any leading shape [..., D] -> logits [..., vocabulary]."""
        return self.mlm_head(states, self.text.embeddings.word)
