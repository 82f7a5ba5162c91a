"""Configuration of SyCoCa: the `model:` section of a training YAML. Details that the paper leaves open are options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softmask.models.config import (
    MAX_TEMPERATURE,
    AttentionLibrary,
    VisionConfig,
    at_least_one,
    check,
    check_heads,
    check_library,
)

MAX_LOGIT_SCALE = 100.0


@dataclass
class CausalTextConfig:
    """A text encoder of `layers` blocks, and a text decoder of `decoder_layers` pairs of blocks."""

    vocab_size: int = 0  # 0: the tokenizer's
    width: int = 768
    heads: int = 12
    layers: int = 12
    decoder_layers: int = 12
    max_positions: int = 76
    attention: AttentionLibrary = "sdpa"
    initializer_range: float = 0.02
    # "own": the last norm applies to all tokens, CLS takes the position after the caption's last token, and
    # initializer_range sets the initial weights; "open_clip": the norm applies to CLS alone, which takes the last
    # position of all, and width and depth set the initial weights
    style: Literal["own", "open_clip"] = "own"

    def __post_init__(self) -> None:
        expected = at_least_one(self, "width", "heads", "layers", "decoder_layers", "max_positions") | {
            "vocab_size": (self.vocab_size >= 0, "at least 0"),
            "initializer_range": (self.initializer_range > 0, "a number > 0"),
        }
        check(self, expected)
        check_library(self.attention)
        check_heads(self.width, self.heads)


@dataclass
class SyCoCaWeights:
    """Weights of the three losses. At 0 the caption loss and the reconstruction loss are not computed."""

    itc: float = 1.0
    caption: float = 2.0
    tgmim: float = 1.0

    def __post_init__(self) -> None:
        check(self, {name: (weight >= 0, "a number >= 0") for name, weight in vars(self).items()})


@dataclass
class SyCoCaConfig:
    """With `reconstruct: false` and `caption_masking: none` it is CoCa; `pooler_queries` adds CoCa's pooler."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: CausalTextConfig = field(default_factory=CausalTextConfig)
    weights: SyCoCaWeights = field(default_factory=SyCoCaWeights)
    embed_dim: int = 512
    pooler_queries: int = 0  # outputs of the attentional pooler for the caption decoder, beside the one for the
    # contrastive loss; 0: no pooler
    pooler_heads: int = 8
    temperature: float = 0.07  # initial value; it is learned
    gamma: float = 0.0
    # a momentum encoder fills a queue and softens the targets, as in ALBEF
    queue_size: int = 0  # 0: no momentum encoder; the contrastive loss sees the batch alone
    momentum: float = 0.995
    alpha: float = 0.4
    # masks
    masks: Literal["attentive", "random"] = (
        "attentive"  # patches most similar to a token of the caption, or random ones
    )
    relevance: Literal["projection", "tokens"] = "projection"  # compare after the contrastive projections, or before
    relevance_tokens: Literal["all", "words"] = "all"  # tokens to compare patches with; "words": without [CLS], [SEP]
    # how the caption decoder is kept from seeing irrelevant patches. "tokens": it gets no tokens of them; "pixels": the
    # image encoder gets no pixels of them either, in a pass of its own; "none": it sees them
    caption_masking: Literal["tokens", "pixels", "none"] = "tokens"
    caption_ratio: float = 0.5  # share of the patches, the most relevant ones, that the caption decoder sees
    caption_whole_steps: int = 0  # first steps, in which the caption decoder sees whole images, and
    caption_whole_every: int = 0  # every so many steps it sees them again; 0: never
    reconstruct: bool = True  # text-guided reconstruction of masked patches
    # "pixels": the image encoder does not see the masked patches, in a pass of its own; "tokens": their tokens are
    # replaced after the encoder, whose self-attention has already mixed them into others
    reconstruct_masking: Literal["pixels", "tokens"] = "pixels"
    reconstruct_ratio: float = 0.5  # share of the patches, the most relevant ones, that are masked
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
            "caption_whole_steps": (self.caption_whole_steps >= 0, "at least 0"),
            "caption_whole_every": (self.caption_whole_every >= 0, "at least 0"),
            "caption_ratio": (0 < self.caption_ratio < 1, "a number in (0, 1)"),
            "reconstruct_ratio": (0 < self.reconstruct_ratio < 1, "a number in (0, 1)"),
            "image_decoder_layers": (self.image_decoder_layers >= 1, "at least 1"),
        }
        check(self, expected)
        if self.pooler_queries:
            self._check_pooler()

    def sees_whole(self, step: int) -> bool:
        """Whether the caption decoder sees whole images in an optimizer step, from 0."""
        return step < self.caption_whole_steps or self.caption_whole_every > 0 and step % self.caption_whole_every == 0

    @property
    def has_caption_loss(self) -> bool:
        """Whether the caption loss is computed."""
        return self.weights.caption > 0

    @property
    def has_reconstruction(self) -> bool:
        """Whether the reconstruction loss is computed."""
        return self.reconstruct and self.weights.tgmim > 0

    def _check_pooler(self) -> None:
        if self.caption_masking == "tokens":
            expected = "'pixels' or 'none' with pooler_queries (pooled tokens are not patches)"
            raise ValueError(f"caption_masking: expected {expected}, got {self.caption_masking!r}")
        if self.vision.pool != "cls":
            expected = "'cls' with pooler_queries (the pooler takes its place)"
            raise ValueError(f"vision.pool: expected {expected}, got {self.vision.pool!r}")
