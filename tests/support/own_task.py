"""A task as in a user's own package: two encoders, a contrastive loss, an evaluation section."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from softmask import ops
from softmask.batch import Batch
from softmask.evaluation.sections import Evaluation, Section
from softmask.models.config import SpecialIds, VisionConfig
from softmask.models.layers.packing import Packing
from softmask.models.sycoca.backbone import Backbone
from softmask.models.sycoca.config import CausalTextConfig, SyCoCaConfig
from softmask.tasks.base import Curve, Task


@dataclass
class TwoEncodersConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: CausalTextConfig = field(default_factory=CausalTextConfig)
    embed_dim: int = 16
    logit_scale: float = 10.0


@dataclass
class Output:
    loss: Tensor
    terms: dict[str, Tensor]


class TwoEncoders(nn.Module):
    def __init__(self, config: TwoEncodersConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(SyCoCaConfig(vision=config.vision, text=config.text, embed_dim=config.embed_dim))

    def forward(self, batch: Batch, *, scale: float) -> Output:
        _, image = self.encode_image(batch.images)
        text = self.backbone.encode_texts(batch.input_ids, Packing.of(batch.attention_mask)).feature
        loss = ops.focal_contrastive_loss(image, text, scale, gamma=0.0)
        return Output(loss, {"contrast": loss.detach()})

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone.vision(images)
        return tokens, self.backbone.image_feature(self.backbone.vision.pool(tokens))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        texts = self.backbone.encode_texts(input_ids, Packing.of(attention_mask))
        return texts.packing.pad(texts.tokens), texts.feature

    @property
    def patch_grid(self) -> tuple[int, int]:
        return self.backbone.vision.patch_grid

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.vision.num_prefix_tokens

    def update_momentum(self) -> None: ...

    def enqueue(self, output: Output) -> None: ...

    def statistics(self) -> list[Tensor]:
        return list(self.buffers())

    def set_activation_checkpointing(self, enable: bool) -> None:
        self.backbone.vision.set_activation_checkpointing(enable)


class TwoEncodersTask(Task):
    Config = TwoEncodersConfig
    curves = {"contrast": Curve("Two encoders: contrast", "nats")}

    def build(self, config: TwoEncodersConfig, special_ids: SpecialIds) -> nn.Module:
        return TwoEncoders(config)

    def step_options(self, config: TwoEncodersConfig, step: int, *, steps_per_epoch: float) -> dict[str, float]:
        return {"scale": config.logit_scale}

    def sections(self, config: TwoEncodersConfig) -> tuple[str, ...]:
        return ("retrieval", "tests.support.own_task:Brightness")

    def title(self, config: TwoEncodersConfig) -> str:
        return "Two encoders"

    def facts(self, config: TwoEncodersConfig) -> list[tuple[str, str]]:
        return [("Width of features", str(config.embed_dim))]


class Brightness(Section):
    """The mean level of the gallery's images."""

    name = "brightness"

    def run(self, given: Evaluation) -> dict:
        levels = [torch.tensor(list(sample.image.convert("L").tobytes())).float().mean() for sample in given.first()]
        return {"samples": len(levels), "level": float(torch.stack(levels).mean())}

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        return [f"mean level of {result['samples']} images: {result['level']:.1f}"]


class NoTask:
    pass
