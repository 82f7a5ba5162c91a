"""Typed configuration of the encoders that models share, and the checks of every model's configuration."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SpecialIds:
    """Token ids the model must know, read from the tokenizer."""

    pad: int
    cls: int
    sep: int
    mask: int


CONV_VIT = "conv_vit"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # ALBEF's


def check(config: object, expected: dict[str, tuple[bool, str]]) -> None:
    """expected: key -> (whether its value is right, what was expected)."""
    for name, (right, description) in expected.items():
        if not right:
            raise ValueError(f"{name}: expected {description}, got {getattr(config, name)!r}")


def at_least_one(config: object, *names: str) -> dict[str, tuple[bool, str]]:
    """What `check` expects of sizes and numbers."""
    return {name: (getattr(config, name) >= 1, "at least 1") for name in names}


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"text.width: expected a multiple of text.heads ({heads}), got {width}")


def _check_pool(name: str, pool: str) -> None:
    if pool not in ("cls", "mean"):
        raise ValueError(f"{name}: expected 'cls' or 'mean', got {pool!r}")


LIBRARIES = {"sdpa": "torch", "eager": "torch", "flash_attn": "flash_attn", "xformers": "xformers"}
"""What a configuration may name -> the package that it needs."""


def check_library(name: str) -> None:
    """ValueError where the name is unknown or its package is not installed."""
    if name not in LIBRARIES:
        raise ValueError(f"text.attention: expected one of {', '.join(map(repr, LIBRARIES))}, got {name!r}")
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        raise ValueError(f"text.attention: {name!r} needs the package {LIBRARIES[name]}, which is not installed")


@dataclass
class ConvViTConfig:
    """A small ViT behind a convolutional stem, for small images and small budgets."""

    patch_size: int = 8
    width: int = 192
    depth: int = 4
    heads: int = 3
    mlp_ratio: float = 4.0
    stem_width: int = 32

    def __post_init__(self) -> None:
        check(self, at_least_one(self, "patch_size", "width", "depth", "heads", "stem_width"))
        check(self, {"mlp_ratio": (self.mlp_ratio > 0, "a number > 0")})
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads ({self.heads}), got {self.width}")


@dataclass
class VisionConfig:
    """Image encoder: any timm ViT, or `conv_vit`."""

    name: str = "vit_base_patch16_224"
    image_size: int = 256
    patch_size: int = 0  # of a timm ViT; 0: the model's own
    checkpoint: str = ""  # file of timm weights; position embeddings are resized to image_size
    drop_path: float = 0.0
    pool: str = "cls"  # what the contrastive loss sees: "cls", or "mean" over patches (conv_vit: before the last norm)
    conv_vit: ConvViTConfig = field(default_factory=ConvViTConfig)

    def __post_init__(self) -> None:
        self.checkpoint = os.path.expanduser(self.checkpoint)
        check(self, at_least_one(self, "image_size"))
        check(self, {"drop_path": (0 <= self.drop_path < 1, "a number in [0, 1)")})
        _check_pool("vision.pool", self.pool)
        if self.patch_size and self.name == CONV_VIT:
            own = f"{CONV_VIT} has vision.conv_vit.patch_size"
            raise ValueError(f"vision.patch_size: expected 0 ({own}), got {self.patch_size}")
        if self.patch_size < 0:
            raise ValueError(f"vision.patch_size: expected at least 0, got {self.patch_size}")
        if self.patch_size and self.image_size % self.patch_size:
            expected = f"a multiple of vision.patch_size {self.patch_size}"
            raise ValueError(f"vision.image_size: expected {expected}, got {self.image_size}")


@dataclass
class TextConfig:
    """BERT: the first `text_layers` read the caption, the following `fusion_layers` also read the image."""

    vocab_size: int = 0  # 0: the tokenizer's
    width: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    text_layers: int = 6
    fusion_layers: int = 6
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1  # of self-attention; cross-attention maps are never dropped
    attention: str = "sdpa"  # who computes attention without soft masks: "sdpa", "flash_attn", "xformers", "eager"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # standard deviation of fresh weights; small widths want more
    pool: str = (
        "cls"  # what the contrastive loss sees: "cls", or "mean" over the caption's tokens, CLS and SEP included
    )
    checkpoint: str = ""  # folder of a Hugging Face BERT, such as bert-base-uncased

    def __post_init__(self) -> None:
        self.checkpoint = os.path.expanduser(self.checkpoint)
        _check_pool("text.pool", self.pool)
        check_library(self.attention)
        sizes = ("width", "heads", "intermediate_size", "text_layers", "fusion_layers", "max_positions")
        shares = {name: getattr(self, name) for name in ("dropout", "attention_dropout")}
        expected = {name: (0 <= share < 1, "a number in [0, 1)") for name, share in shares.items()}
        expected |= {
            "vocab_size": (self.vocab_size >= 0, "at least 0"),
            "layer_norm_eps": (self.layer_norm_eps > 0, "a number > 0"),
            "initializer_range": (self.initializer_range > 0, "a number > 0"),
        }
        check(self, at_least_one(self, *sizes) | expected)
        check_heads(self.width, self.heads)
