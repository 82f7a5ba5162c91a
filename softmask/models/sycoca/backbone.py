"""Both encoders and the pooler; with the projections, the part that pre-training's momentum encoder copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.distilled import Network
from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import Packed, Packing
from softmask.models.layers.pooler import AttentionalPooler
from softmask.models.layers.transformer import CausalTextEncoder, initialize_by_depth
from softmask.models.layers.vision import VisionEncoder
from softmask.models.sycoca.config import SyCoCaConfig


@dataclass(frozen=True)
class Texts(Packed):
    """Encoded captions."""

    feature: Tensor  # [B, embed_dim], normalized
    input_ids: Tensor  # [B, T], with padding


class Encoders(Network):
    """Both encoders and the pooler. Subclasses initialize the text encoder."""

    def __init__(self, config: SyCoCaConfig) -> None:
        super().__init__()
        text = config.text
        self.vision = VisionEncoder(config.vision)
        self.text = CausalTextEncoder(
            vocab_size=text.vocab_size,
            width=text.width,
            heads=text.heads,
            layers=text.layers,
            max_positions=text.max_positions,
            library=text.attention,
            open_clip=text.style == "open_clip",
        )
        width = self.vision.width
        self.pooler: AttentionalPooler | None = None
        if config.pooler_queries:
            self.pooler = AttentionalPooler(
                width, config.pooler_heads, queries=config.pooler_queries, library=text.attention
            )
            initialize(self.pooler, std=text.initializer_range)

    def set_activation_checkpointing(self, enable: bool) -> None:
        super().set_activation_checkpointing(enable)
        self.text.activation_checkpointing = enable

    def initialize_text_as_open_clip(self) -> None:
        text = self.text
        width = text.norm.normalized_shape[0]
        initialize_by_depth(text.blocks, width=width, layers=len(text.blocks))
        nn.init.normal_(text.word.weight, std=0.02)
        nn.init.normal_(text.position.weight, std=0.01)

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The image encoder's tokens [B, P, D] -> the pooled token for the contrastive loss, [B, D], and the context of
        the caption decoder: the pooler's other outputs [B, pooler_queries, D] or, without a pooler, the tokens."""
        if self.pooler is None:
            return self.vision.pool(tokens), tokens
        outputs = self.pooler(tokens)
        return outputs[:, 0], outputs[:, 1:]


class Backbone(Encoders):
    """With the projections of the contrastive loss."""

    def __init__(self, config: SyCoCaConfig) -> None:
        super().__init__(config)
        text, width = config.text, self.vision.width
        self.image_projection = nn.Linear(width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, config.embed_dim, bias=False)
        for part in (self.text, self.image_projection, self.text_projection):
            initialize(part, std=text.initializer_range)
        if text.style == "open_clip":
            self.initialize_text_as_open_clip()
            for projection in (self.image_projection, self.text_projection):
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def image_feature(self, pooled: Tensor) -> Tensor:
        """Pooled tokens [B, D] -> normalized features [B, embed_dim]."""
        return F.normalize(at_least_fp32(self.image_projection(pooled)), dim=-1)

    def project_patches(self, patches: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, embed_dim], each patch pooled and projected by itself."""
        pooled = self.vision.pool_each(patches) if self.pooler is None else self.pooler.each(patches)
        return self.image_projection(pooled)

    def encode_texts(self, input_ids: Tensor, packing: Packing) -> Texts:
        """input_ids [B, T] with the packing of their real tokens."""
        tokens, cls = self.text(input_ids, packing)
        feature = F.normalize(at_least_fp32(self.text_projection(cls)), dim=-1)
        return Texts(tokens, packing, feature, input_ids)
