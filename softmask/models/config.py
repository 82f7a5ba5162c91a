"""Configuration of the encoders that both models share, and the checks of every model's configuration."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that a model needs, read from the tokenizer."""

    pad: int
    cls: int
    sep: int
    mask: int


CONV_VIT = "conv_vit"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.001, 0.5  # ALBEF's


def check(config: object, expected: dict[str, tuple[bool, str]]) -> None:
    """ValueError for a wrong value of a dataclass: a choice that is not in its Literal, or a key of `expected`: key ->
    (whether the value is right, what was expected)."""
    for name, kind in get_type_hints(type(config)).items():
        if get_origin(kind) is Literal and getattr(config, name) not in get_args(kind):
            *others, last = map(repr, get_args(kind))
            raise ValueError(f"{name}: expected {', '.join(others)} or {last}, got {getattr(config, name)!r}")
    for name, (right, description) in expected.items():
        if not right:
            raise ValueError(f"{name}: expected {description}, got {getattr(config, name)!r}")


def at_least_one(config: object, *names: str) -> dict[str, tuple[bool, str]]:
    """For `check`: keys whose values are at least 1."""
    return {name: (getattr(config, name) >= 1, "at least 1") for name in names}


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"text.width: expected a multiple of text.heads ({heads}), got {width}")


Pool = Literal["cls", "mean"]
TextPool = Literal["cls", "mean", "words"]
AttentionLibrary = Literal["sdpa", "flash_attn", "xformers", "eager"]


def check_library(name: AttentionLibrary) -> None:
    """ValueError where the package of the library is not installed."""
    package = "torch" if name in ("sdpa", "eager") else name
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"text.attention: {name!r} needs the package {package}, which is not installed")


@dataclass
class ConvViTConfig:
    """A small ViT after a convolutional stem, for small images and small budgets."""

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
    patch_size: int = 0  # for a timm ViT; 0: the model's default
    checkpoint: str = ""  # a file of timm weights; position embeddings are resized to image_size
    drop_path: float = 0.0
    pool: Pool = "cls"  # for the contrastive loss: "cls", or "mean" over patches (conv_vit: before the last norm)
    conv_vit: ConvViTConfig = field(default_factory=ConvViTConfig)

    def __post_init__(self) -> None:
        self.checkpoint = os.path.expanduser(self.checkpoint)
        check(self, at_least_one(self, "image_size"))
        check(self, {"drop_path": (0 <= self.drop_path < 1, "a number in [0, 1)")})
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
    """BERT: the first `text_layers` read the caption; the `fusion_layers` after them also read the image."""

    vocab_size: int = 0  # 0: the tokenizer's
    width: int = 768
    heads: int = 12
    intermediate_size: int = 3072
    text_layers: int = 6
    fusion_layers: int = 6
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1  # of self-attention; cross-attention maps are never dropped
    attention: AttentionLibrary = "sdpa"  # for attention without soft masks
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02  # standard deviation of initial weights; small widths need more
    pool: TextPool = "cls"  # for the contrastive loss: "cls", "mean" over all tokens, or "words": without CLS and SEP
    checkpoint: str = ""  # a folder with a Hugging Face BERT, such as bert-base-uncased

    def __post_init__(self) -> None:
        self.checkpoint = os.path.expanduser(self.checkpoint)
        sizes = ("width", "heads", "intermediate_size", "text_layers", "fusion_layers", "max_positions")
        shares = {name: getattr(self, name) for name in ("dropout", "attention_dropout")}
        expected = {name: (0 <= share < 1, "a number in [0, 1)") for name, share in shares.items()}
        expected |= {
            "vocab_size": (self.vocab_size >= 0, "at least 0"),
            "layer_norm_eps": (self.layer_norm_eps > 0, "a number > 0"),
            "initializer_range": (self.initializer_range > 0, "a number > 0"),
        }
        check(self, at_least_one(self, *sizes) | expected)
        check_library(self.attention)
        check_heads(self.width, self.heads)


@dataclass
class Distillation:
    """Soft targets of a momentum copy; alpha 0 needs none and keeps none."""

    alpha: float = 0.4
    alpha_warmup_epochs: float = 0.0  # alpha rises linearly over these epochs
    momentum: float = 0.995

    def __post_init__(self) -> None:
        expected = {
            "alpha": (0 <= self.alpha <= 1, "a number in [0, 1]"),
            "alpha_warmup_epochs": (self.alpha_warmup_epochs >= 0, "at least 0"),
            "momentum": (0 <= self.momentum <= 1, "a number in [0, 1]"),
        }
        check(self, expected)


@dataclass
class VqaHead(Distillation):
    """VQA: the `head:` section of a configuration."""

    alpha_warmup_epochs: float = 1.0
    answer_list: str = ""  # answers to choose from, a JSON list of texts; empty: evaluation generates them
    k: int = 128  # answers whose whole probability is computed, by their first token's
    answer_length: int = 10  # tokens of an answer, [CLS] and [SEP] included

    def __post_init__(self) -> None:
        super().__post_init__()
        self.answer_list = os.path.expanduser(self.answer_list)
        check(self, {"k": (self.k >= 1, "at least 1"), "answer_length": (self.answer_length >= 3, "at least 3")})


@dataclass
class ClassificationHead:
    """Fine-tuned classification: the `head:` section of a configuration."""

    names: list[str] = field(default_factory=list)  # of the classes; empty: those of data.train
    smoothing: float = 0.1  # of labels
    mixup: float = 0.8  # Beta parameter of mixed images; 0: none
    cutmix: float = 1.0  # Beta parameter of images with a pasted part of others; 0: none

    def __post_init__(self) -> None:
        expected = {
            "smoothing": (0 <= self.smoothing < 1, "a number in [0, 1)"),
            "mixup": (self.mixup >= 0, "at least 0"),
            "cutmix": (self.cutmix >= 0, "at least 0"),
        }
        check(self, expected)
