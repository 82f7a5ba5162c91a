"""Configuration of SoftMask++: the `model:` section of a training YAML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from softmask.models.config import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    TextConfig,
    VisionConfig,
    at_least_one,
    check,
)


@dataclass
class LossWeights:
    """Weights of the four terms; in SoftMask++ all are 1."""

    itc: float = 1.0
    itm: float = 1.0
    itm_soft: float = 1.0
    mlm: float = 1.0

    def __post_init__(self) -> None:
        check(self, {name: (weight >= 0, "a number >= 0") for name, weight in vars(self).items()})


@dataclass
class SoftMaskPPConfig:
    """SoftMask++ on ALBEF. With `soft_mask: false`, `gamma: 0` and `mask_text: mlm` the losses are ALBEF's; its recipe
    also has `data.distort: false`, `data.rand_augment: true` and `alpha_warmup_epochs: 1`.

    Details that the paper leaves open are options.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    weights: LossWeights = field(default_factory=LossWeights)
    embed_dim: int = 256
    # contrastive loss and momentum encoder
    temperature: float = 0.07
    learn_temperature: bool = True
    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_warmup_steps: int = 0  # alpha rises linearly over these steps, or
    alpha_warmup_epochs: float = 0.0  # over these epochs; both 0: no warm-up
    contrast_steps: int = 0  # first steps, with the contrastive loss alone
    gamma: float = 2.0
    negative_temperature: float = 0.0  # for drawing hard negatives: large is uniform; 0: the contrastive loss's
    share_positives: bool = False  # captions of one image are positives of each other
    # masked text
    mask_probability: float = 0.15
    mask_text: Literal["all", "mlm"] = "all"  # which terms read the masked caption; "mlm": MLM alone, in its own pass
    # text-driven soft mask
    soft_mask: bool = True
    soft_negatives: bool = True  # soft-masked mismatches; without them "masked" alone would predict "match"
    cam_layer: int = 2  # fusion layer, from 0; a later layer must mix the words into CLS
    # whose match logit the map explains: the step's own; the same from another pass; or the momentum encoder's
    cam_source: Literal["online", "recompute", "momentum"] = "online"
    strength: float = 1.0
    normalize: Literal["minmax", "max", "sum"] = "minmax"

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
        }
        check(self, expected)
        if not 0 <= self.cam_layer < max(self.text.fusion_layers - 1, 1):
            raise ValueError(
                f"cam_layer: expected 0 <= cam_layer < text.fusion_layers - 1 = {self.text.fusion_layers - 1} "
                f"(in the last layer only CLS has a gradient), got {self.cam_layer}"
            )
        if self.soft_mask and self.text.fusion_layers < 2:
            raise ValueError(f"text.fusion_layers: soft masks need at least 2, got {self.text.fusion_layers}")
