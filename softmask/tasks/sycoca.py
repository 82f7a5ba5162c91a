"""SyCoCa and, with its options off, CoCa."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softmask.models.config import SpecialIds
from softmask.models.sycoca.config import SyCoCaConfig
from softmask.tasks.base import Curve, Task, check_queue

if TYPE_CHECKING:
    from softmask.models.sycoca.model import SyCoCa


ENCODERS = ("vision", "text", "pooler", "image_projection", "text_projection")
RECONSTRUCTION = ("image_decoder", "pixel_head", "mask_token")
"""Parts that only TG-MIM has."""
MOMENTUM = ("momentum_encoder", "contrast")
"""Parts that only a queue has."""


class SyCoCaTask(Task):
    Config = SyCoCaConfig
    eval_resize = "crop"
    ends_captions = True
    renamed = {"twin": "momentum_encoder"} | {part: f"backbone.{part}" for part in ENCODERS}
    curves = {
        "itc": Curve("ITC: contrast", "nats"),
        "caption": Curve("IC: the next word", "nats"),
        "tgmim": Curve("TG-MIM: hidden patches", "squared error"),
        "temperature": Curve("Temperature of ITC"),
    }

    def build(self, config: SyCoCaConfig, special_ids: SpecialIds) -> SyCoCa:
        from softmask.models.sycoca.model import SyCoCa

        return SyCoCa(config, special_ids=special_ids)

    def weight_origins(self, model: SyCoCa) -> dict[str, str]:
        return {"vision": model.backbone.vision.weights_from}

    def check_batch(self, config: SyCoCaConfig, batch: int) -> None:
        check_queue(config.queue_size, batch)

    def step_options(self, config: SyCoCaConfig, step: int, *, steps_per_epoch: float) -> dict[str, Any]:
        return {"whole": config.sees_whole(step)}

    def sections(self, config: SyCoCaConfig) -> tuple[str, ...]:
        generated = ("captioning",) * config.has_caption_loss + ("reconstruction",) * config.has_reconstruction
        return ("retrieval", *generated, "zero_shot")

    def title(self, config: SyCoCaConfig) -> str:
        return "SyCoCa" if _has_masks(config) else "CoCa"

    def facts(self, config: SyCoCaConfig) -> list[tuple[str, str]]:
        text = config.text
        return [
            ("Text and captions", f"{text.layers} + 2 x {text.decoder_layers} layers, width {text.width}"),
            ("Image decoder", f"2 x {config.image_decoder_layers} layers" if config.has_reconstruction else "off"),
            ("Masks", config.masks if _has_masks(config) else "off"),
            ("Focal gamma", f"{config.gamma:g}"),
        ]

    def additions(self, config: SyCoCaConfig) -> list[str]:
        masked = config.masks == "attentive" and _has_masks(config)
        return ["attentive masks"] * masked + ["text-guided reconstruction"] * config.has_reconstruction

    def hidden_patches(self, config: SyCoCaConfig) -> str:
        which = "those most similar to a token of the caption" if config.masks == "attentive" else "drawn at random"
        where = "from the image encoder" if config.reconstruct_masking == "pixels" else "behind the image encoder"
        return f"{100 * config.reconstruct_ratio:g} % of the patches, {which}, are hidden {where}"

    def learned(self, config: SyCoCaConfig) -> str:
        verbs = ["writes"] * config.has_caption_loss + ["reconstructs"] * config.has_reconstruction or ["finds"]
        return f"what it {' and '.join(verbs)}"


def _has_masks(config: SyCoCaConfig) -> bool:
    return config.has_reconstruction or (config.has_caption_loss and config.caption_masking != "none")
