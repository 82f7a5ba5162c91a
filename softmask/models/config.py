"""Typed configuration of the models: the `model:` section of a training YAML."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from .attention import check_library


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


@dataclass
class ConvViTConfig:
    """A small ViT behind a convolutional stem, for small pictures and small budgets."""

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


@dataclass
class LossWeights:
    """Weights of the four terms (SoftMask++: all one)."""

    itc: float = 1.0
    itm: float = 1.0
    itm_soft: float = 1.0
    mlm: float = 1.0

    def __post_init__(self) -> None:
        check(self, {name: (weight >= 0, "a number >= 0") for name, weight in vars(self).items()})


@dataclass
class SoftMaskPPConfig:
    """SoftMask++ on ALBEF. With `soft_mask: false`, `gamma: 0` and `mask_text: mlm` the losses are ALBEF's; its recipe
    also has `data.distort: false`, `data.rand_augment: true` and an `alpha_warmup_epochs` of one.

    What the paper does not state is an option here.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    embed_dim: int = 256
    # contrastive loss and momentum twin
    temperature: float = 0.07
    learn_temperature: bool = True
    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_warmup_steps: int = 0  # alpha rises to its value over these; or
    alpha_warmup_epochs: float = 0.0  # over these passes over the captions; both 0: alpha from the first step on
    contrast_steps: int = 0  # first steps with the contrastive loss alone
    gamma: float = 2.0
    negative_temperature: float = 0.0  # of the draw of hard negatives: large is uniform; 0: the contrastive loss's
    share_positives: bool = False  # captions of one image are positives of each other
    # masked text
    mask_probability: float = 0.15
    mask_text: str = "all"  # "all": every term sees the masked caption; "mlm": MLM alone, in a pass of its own
    # text-driven soft mask
    soft_mask: bool = True
    soft_negatives: bool = True  # without them, "masked" would come to mean "match"
    cam_layer: int = 2  # fusion layer, from 0; a layer must follow that mixes the words into CLS
    cam_source: str = "online"  # whose match the map explains: "online", of the step itself; "recompute", the same by
    # another pass, under ZeRO-3 and activation checkpointing; "momentum", the twin's
    strength: float = 1.0
    normalize: str = "minmax"

    def __post_init__(self) -> None:
        expected = at_least_one(self, "embed_dim") | {
            "temperature": (
                MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE,
                f"a number in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}]",
            ),
            "queue_size": (self.queue_size >= 0, "at least 0"),
            "momentum": (0 <= self.momentum <= 1, "a number in [0, 1]"),
            "alpha": (0 <= self.alpha <= 1, "a number in [0, 1]"),
            "alpha_warmup_steps": (self.alpha_warmup_steps >= 0, "at least 0"),
            "alpha_warmup_epochs": (
                self.alpha_warmup_epochs >= 0 and not (self.alpha_warmup_steps and self.alpha_warmup_epochs),
                "at least 0, and 0 beside alpha_warmup_steps",
            ),
            "contrast_steps": (self.contrast_steps >= 0, "at least 0"),
            "negative_temperature": (self.negative_temperature >= 0, "a number >= 0"),
            "gamma": (self.gamma >= 0, "a number >= 0"),
            "mask_probability": (0 <= self.mask_probability <= 1, "a number in [0, 1]"),
            "cam_source": (
                self.cam_source in ("online", "momentum", "recompute"),
                "'online', 'momentum' or 'recompute'",
            ),
            "normalize": (self.normalize in ("minmax", "max", "sum"), "'minmax', 'max' or 'sum'"),
        }
        check(self, expected)
        if self.mask_text not in ("all", "mlm"):
            raise ValueError(f"mask_text: expected 'all' or 'mlm', got {self.mask_text!r}")
        if not 0 <= self.cam_layer < max(self.text.fusion_layers - 1, 1):
            raise ValueError(
                f"cam_layer: expected 0 <= cam_layer < text.fusion_layers - 1 = {self.text.fusion_layers - 1} "
                f"(in the last layer only CLS has a gradient), got {self.cam_layer}"
            )
        if self.soft_mask and self.text.fusion_layers < 2:
            raise ValueError(f"text.fusion_layers: soft masks need at least 2, got {self.text.fusion_layers}")
