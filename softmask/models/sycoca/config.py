"""Typed configuration of SyCoCa. What the paper does not state is an option here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softmask.models.config import MAX_TEMPERATURE, VisionConfig, at_least_one, check, check_heads, check_library

MAX_LOGIT_SCALE = 100.0
Style = Literal["own", "open_clip"]


@dataclass
class CausalTextConfig:
    """Text encoder of `layers` blocks, and text decoder of `decoder_layers` pairs of blocks."""

    vocab_size: int = 0  # 0: the tokenizer's
    width: int = 768
    heads: int = 12
    layers: int = 12
    decoder_layers: int = 12
    max_positions: int = 76
    attention: str = "sdpa"  # "sdpa", "flash_attn", "xformers", "eager"
    initializer_range: float = 0.02
    # "own": the last norm is of all tokens, CLS has the position behind the caption's last token, weights begin at
    # initializer_range; "open_clip": the norm is of CLS alone, whose position is the last of all, and weights begin by
    # width and depth
    style: Style = "own"

    def __post_init__(self) -> None:
        check_library(self.attention)
        expected = at_least_one(self, "width", "heads", "layers", "decoder_layers", "max_positions") | {
            "vocab_size": (self.vocab_size >= 0, "at least 0"),
            "initializer_range": (self.initializer_range > 0, "a number > 0"),
        }
        check(self, expected)
        check_heads(self.width, self.heads)


@dataclass
class SyCoCaWeights:
    """Weights of the three losses; those of captions and of reconstruction are not computed where theirs is 0."""

    itc: float = 1.0
    caption: float = 2.0
    tgmim: float = 1.0

    def __post_init__(self) -> None:
        check(self, {name: (weight >= 0, "a number >= 0") for name, weight in vars(self).items()})


@dataclass
class SyCoCaConfig:
    """With `reconstruct: false` and `caption_masking: none` it is CoCa, with `pooler_queries` CoCa with its pooler."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: CausalTextConfig = field(default_factory=CausalTextConfig)
    weights: SyCoCaWeights = field(default_factory=SyCoCaWeights)
    embed_dim: int = 512
    pooler_queries: int = 0  # outputs of the attentional pooler that the caption is told from, beside the one that is
    # contrasted; 0: no pooler
    pooler_heads: int = 8
    temperature: float = 0.07  # at first; it is learned
    gamma: float = 0.0
    # momentum encoder of the encoders, which fills a queue and softens the targets as in ALBEF
    queue_size: int = 0  # 0: no momentum encoder, the contrastive loss sees the batch alone
    momentum: float = 0.995
    alpha: float = 0.4
    # masks
    masks: str = "attentive"  # which patches: those most similar to a token of the caption, or "random"
    relevance: str = "projection"  # similarity of patches and tokens after the contrastive projections, or as "tokens"
    relevance_tokens: str = "all"  # tokens that patches are compared with; "words": without [CLS] and [SEP]
    # "tokens": the caption's decoder does not see other patches' tokens; "pixels": nor does the image encoder see their
    # pixels, in a pass of its own; "none": it sees all
    caption_masking: str = "tokens"
    caption_ratio: float = 0.5  # of the patches, the most relevant: the caption is told from them
    reconstruct: bool = True  # text-guided reconstruction of masked patches
    # "pixels": the image encoder does not see them, in a pass of its own; "tokens": what it saw of them is replaced,
    # but the others' tokens know of them by self-attention
    reconstruct_masking: str = "pixels"
    reconstruct_ratio: float = 0.5  # of the patches, the most relevant: they are masked
    normalize_pixels: bool = True
    image_decoder_layers: int = 4
    image_decoder_heads: int = 12

    def __post_init__(self) -> None:
        expected = at_least_one(self, "embed_dim", "image_decoder_heads") | {
            "temperature": (
                1 / MAX_LOGIT_SCALE <= self.temperature <= MAX_TEMPERATURE,
                f"a number in [{1 / MAX_LOGIT_SCALE}, {MAX_TEMPERATURE}]",
            ),
            "pooler_queries": (self.pooler_queries >= 0, "at least 0"),
            "pooler_heads": (self.pooler_heads >= 1, "at least 1"),
            "gamma": (self.gamma >= 0, "a number >= 0"),
            "queue_size": (self.queue_size >= 0, "at least 0"),
            "momentum": (0 <= self.momentum <= 1, "a number in [0, 1]"),
            "alpha": (0 <= self.alpha <= 1, "a number in [0, 1]"),
            "masks": (self.masks in ("attentive", "random"), "'attentive' or 'random'"),
            "caption_ratio": (0 < self.caption_ratio < 1, "a number in (0, 1)"),
            "reconstruct_ratio": (0 < self.reconstruct_ratio < 1, "a number in (0, 1)"),
            "relevance": (self.relevance in ("projection", "tokens"), "'projection' or 'tokens'"),
            "relevance_tokens": (self.relevance_tokens in ("all", "words"), "'all' or 'words'"),
            "caption_masking": (
                self.caption_masking in ("tokens", "pixels", "none"),
                "'tokens', 'pixels' or 'none'",
            ),
            "reconstruct_masking": (self.reconstruct_masking in ("pixels", "tokens"), "'pixels' or 'tokens'"),
            "image_decoder_layers": (self.image_decoder_layers >= 1, "at least 1"),
        }
        check(self, expected)
        if self.pooler_queries:
            self._check_pooler()

    @property
    def has_caption_loss(self) -> bool:
        """Whether captions are told at all."""
        return self.weights.caption > 0

    @property
    def has_reconstruction(self) -> bool:
        """Whether masked patches are reconstructed at all."""
        return self.reconstruct and self.weights.tgmim > 0

    def _check_pooler(self) -> None:
        if self.caption_masking == "tokens":
            expected = "'pixels' or 'none' where there are pooler_queries (pooled tokens are not patches)"
            raise ValueError(f"caption_masking: expected {expected}, got {self.caption_masking!r}")
        if self.vision.pool != "cls":
            expected = "'cls' where there are pooler_queries (the pooler takes its place)"
            raise ValueError(f"vision.pool: expected {expected}, got {self.vision.pool!r}")
