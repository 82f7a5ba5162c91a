"""What SyCoCa's contrastive loss sees: both encoders, the pooler and the projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from softmask.models.layers.numerics import at_least_fp32, initialize
from softmask.models.layers.packing import Packing
from softmask.models.layers.pooler import AttentionalPooler
from softmask.models.layers.transformer import CausalTextEncoder, initialize_by_depth
from softmask.models.layers.vision import VisionEncoder
from softmask.models.sycoca.config import SyCoCaConfig


@dataclass
class Texts:
    """Captions as the text encoder read them: tokens [S, D], their packing, features."""

    tokens: Tensor
    packing: Packing
    feature: Tensor  # [B, embed_dim], normalized
    input_ids: Tensor  # [B, T], with padding


class Encoders(nn.Module):
    """The part of SyCoCa that may have a momentum encoder."""

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
        self.pooler = None
        if config.pooler_queries:
            options = {"queries": config.pooler_queries, "library": text.attention}
            self.pooler = AttentionalPooler(width, config.pooler_heads, **options)
            initialize(self.pooler, std=text.initializer_range)
        self.image_projection = nn.Linear(width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.width, config.embed_dim, bias=False)
        for part in (self.text, self.image_projection, self.text_projection):
            initialize(part, std=text.initializer_range)
        if text.style == "open_clip":
            self._initialize_as_open_clip()

    def _initialize_as_open_clip(self) -> None:
        text = self.text
        width = text.norm.normalized_shape[0]
        initialize_by_depth(text.blocks, width=width, layers=len(text.blocks))
        nn.init.normal_(text.word.weight, std=0.02)
        nn.init.normal_(text.position.weight, std=0.01)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def pool(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The image encoder's tokens [B, P, D] -> what is contrasted, [B, D], and what the caption's decoder reads:
        with a pooler its outputs but the first, [B, pooler_queries, D], else the tokens themselves."""
        if self.pooler is None:
            return self.vision.pool(tokens), tokens
        outputs = self.pooler(tokens)
        return outputs[:, 0], outputs[:, 1:]

    def image_feature(self, pooled: Tensor) -> Tensor:
        """[B, D] of `pool` -> [B, embed_dim], normalized."""
        return F.normalize(at_least_fp32(self.image_projection(pooled)), dim=-1)

    def project_patches(self, patches: Tensor) -> Tensor:
        """[B, P, D] -> [B, P, embed_dim], every patch as if it alone were the image."""
        pool_each = self.vision.pool_each if self.pooler is None else self.pooler.each
        return self.image_projection(pool_each(patches))

    def read(self, input_ids: Tensor, packing: Packing) -> Texts:
        """input_ids [B, T], whose real tokens the packing names."""
        tokens, cls = self.text(input_ids, packing)
        feature = F.normalize(at_least_fp32(self.text_projection(cls)), dim=-1)
        return Texts(tokens, packing, feature, input_ids)
