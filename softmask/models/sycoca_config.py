"""Typed configuration of SyCoCa. What the paper does not state is an option here."""

from __future__ import annotations

from dataclasses import dataclass, field

from .attention import check_library
from .config import MAX_TEMPERATURE, MIN_TEMPERATURE, VisionConfig, check, check_heads


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

    def __post_init__(self) -> None:
        check_library(self.attention)
        check_heads(self.width, self.heads)


@dataclass
class SyCoCaWeights:
    """Weights of the three losses; a caption loss of weight 0 is not computed."""

    itc: float = 1.0
    caption: float = 2.0
    tgmim: float = 1.0


@dataclass
class SyCoCaConfig:
    """With `reconstruct: false` and `caption_masking: none` it is CoCa without a pooler."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: CausalTextConfig = field(default_factory=CausalTextConfig)
    weights: SyCoCaWeights = field(default_factory=SyCoCaWeights)
    embed_dim: int = 512
    temperature: float = 0.07  # at first; it is learned
    gamma: float = 0.0
    masks: str = "attentive"  # which patches: those the caption speaks of, or "random"
    mask_ratio: float = 0.5  # of the patches: reconstructed, and what the caption is told from
    relevance: str = "projection"  # similarity of patches and tokens after the contrastive projections, or as "tokens"
    caption_masking: str = "tokens"  # the caption's decoder does not see other patches; "none": it sees all
    reconstruct: bool = True  # text-guided reconstruction of masked patches
    normalize_pixels: bool = True
    image_decoder_layers: int = 4
    image_decoder_heads: int = 12

    def __post_init__(self) -> None:
        expected = {
            "temperature": (
                MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                f"a number in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]",
            ),
            "gamma": (self.gamma >= 0, "a number >= 0"),
            "masks": (self.masks in ("attentive", "random"), "'attentive' or 'random'"),
            "mask_ratio": (0 < self.mask_ratio < 1, "a number in (0, 1)"),
            "relevance": (self.relevance in ("projection", "tokens"), "'projection' or 'tokens'"),
            "caption_masking": (self.caption_masking in ("tokens", "none"), "'tokens' or 'none'"),
            "image_decoder_layers": (self.image_decoder_layers >= 1, "at least 1"),
        }
        check(self, expected)
