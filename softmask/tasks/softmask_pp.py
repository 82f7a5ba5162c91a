"""SoftMask++ and, with its options off, ALBEF."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softmask.models.config import SpecialIds
from softmask.models.softmask_pp.config import SoftMaskPPConfig
from softmask.tasks.base import Curve, Task, check_queue

if TYPE_CHECKING:
    from softmask.models.softmask_pp.model import SoftMaskPP


def alpha_at(step: int, *, alpha: float, warmup_steps: float) -> float:
    """Weight of the momentum encoder's soft targets: linear from 0 to `alpha` over the first `warmup_steps` steps."""
    return alpha * min(step / warmup_steps, 1.0) if warmup_steps else alpha


class SoftMaskPPTask(Task):
    Config = SoftMaskPPConfig
    matches_pairs = True
    renamed = {"twin": "momentum_encoder"}
    curves = {
        "itc": Curve("ITC: focal contrast", "nats"),
        "itm": Curve("ITM: image-text matching", "nats"),
        "itm_soft": Curve("ITM on softly masked images", "nats"),
        "mlm": Curve("MLM: masked words", "nats"),
        "temperature": Curve("Temperature of ITC"),
    }

    def build(self, config: SoftMaskPPConfig, special_ids: SpecialIds) -> SoftMaskPP:
        from softmask.models.softmask_pp.model import SoftMaskPP

        return SoftMaskPP(config, special_ids=special_ids)

    def weight_origins(self, model: SoftMaskPP) -> dict[str, str]:
        return {"vision": model.backbone.vision.weights_from, "text": model.backbone.text_from}

    def check_batch(self, config: SoftMaskPPConfig, batch: int) -> None:
        check_queue(config.queue_size, batch)

    def step_options(self, config: SoftMaskPPConfig, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        warmup_steps = config.alpha_warmup_steps or config.alpha_warmup_epochs * steps_per_epoch
        alpha = alpha_at(step, alpha=config.alpha, warmup_steps=warmup_steps)
        return {"alpha": alpha, "fuse": step >= config.contrast_steps}

    def sections(self, config: SoftMaskPPConfig) -> tuple[str, ...]:
        return ("retrieval", "grounding", "zero_shot")

    def title(self, config: SoftMaskPPConfig) -> str:
        return "SoftMask++" if config.soft_mask or config.gamma > 0 else "ALBEF"

    def facts(self, config: SoftMaskPPConfig) -> list[tuple[str, str]]:
        text = config.text
        return [
            ("Text and fusion", f"{text.text_layers} + {text.fusion_layers} layers, width {text.width}"),
            (
                "Soft masks",
                f"strength {config.strength:g}, layer {config.cam_layer + 1}" if config.soft_mask else "off",
            ),
            ("Queue", f"{config.queue_size:,}"),
            ("Focal gamma", f"{config.gamma:g}"),
        ]

    def additions(self, config: SoftMaskPPConfig) -> list[str]:
        return ["text-driven soft masks"] * config.soft_mask + ["a focal contrastive loss"] * (config.gamma > 0)

    def learned(self, config: SoftMaskPPConfig) -> str:
        return "where its words point"

    def shows_word_maps(self, config: SoftMaskPPConfig) -> bool:
        return True
