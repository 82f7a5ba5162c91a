"""What a run is, in a table and a sentence: the head of the report."""

from __future__ import annotations

import statistics

from softmask.evaluation.readers import Scorer
from softmask.models import SoftMaskPPConfig, SyCoCaConfig
from softmask.report.page import duration
from softmask.training.config import Config

OF_STATE = ("step", "seconds", "world_size", "skipped_samples")  # of trainer.json


def title(config: Config) -> str:
    """The method's name, or that of what it adds to where nothing is added."""
    model = config.model
    if isinstance(model, SoftMaskPPConfig):
        return "SoftMask++" if model.soft_mask or model.gamma > 0 else "ALBEF"
    return "SyCoCa" if _has_masks(model) else "CoCa"


def _has_masks(model: SyCoCaConfig) -> bool:
    return model.paints or (model.tells and model.caption_masking != "none")


def facts(scorer: Scorer, state: dict, rows: list[dict]) -> list[tuple[str, str]]:
    """What was trained, on what and how, for the table at the top. `state` is the checkpoint's trainer.json."""
    config = scorer.config
    model, train = config.model, config.train
    ranks = state["world_size"]
    learned = sum(weight.numel() for weight in scorer.model.parameters() if weight.requires_grad)
    rates = [row["samples_per_second"] for row in rows if "samples_per_second" in row]
    of_method = _softmask_pp(model) if isinstance(model, SoftMaskPPConfig) else _sycoca(model)
    return [
        ("Steps", f"{state['step']:,}"),
        ("Training time", duration(state["seconds"])),
        ("Throughput", f"{statistics.median(rates):,.0f} samples/s" if rates else "not logged"),
        ("Batch", f"{train.batch_size * train.accumulation * ranks:,} on {ranks} {'rank' if ranks == 1 else 'ranks'}"),
        ("Parameters", f"{learned / 1e6:.1f} M trained"),
        ("Image encoder", f"{model.vision.name}, {config.data.image_size} px"),
        *of_method,
        ("Focal gamma", f"{model.gamma:g}"),
        ("Distortions", "on" if config.data.distort else "off"),
        ("Precision", f"{train.precision}, ZeRO {config.zero_stage}"),
        ("Peak learning rate", f"{config.optimizer.lr:g}"),
        ("Unreadable samples", f"{state['skipped_samples']:,} replaced"),
        ("Seed", str(config.seed)),
    ]


def _softmask_pp(model: SoftMaskPPConfig) -> list[tuple[str, str]]:
    return [
        ("Text and fusion", f"{model.text.text_layers} + {model.text.fusion_layers} layers, width {model.text.width}"),
        ("Soft masks", f"strength {model.strength:g}, layer {model.cam_layer + 1}" if model.soft_mask else "off"),
        ("Queue", f"{model.queue_size:,}"),
    ]


def _sycoca(model: SyCoCaConfig) -> list[tuple[str, str]]:
    text = model.text
    return [
        ("Text and captions", f"{text.layers} + 2 x {text.decoder_layers} layers, width {text.width}"),
        ("Image decoder", f"2 x {model.image_decoder_layers} layers" if model.paints else "off"),
        ("Masks", model.masks if _has_masks(model) else "off"),
    ]


def lead(scorer: Scorer) -> str:
    model = scorer.config.model
    if isinstance(model, SoftMaskPPConfig):
        parts, learned = _parts_of_softmask_pp(model), "where its words point"
    else:
        verbs = ["writes"] * model.tells + ["paints"] * model.paints or ["finds"]
        parts, learned = _parts_of_sycoca(model), f"what it {' and '.join(verbs)}"
    additions = f" with {' and '.join(parts)}" if parts else ""
    return (
        f"A vision-language model pre-trained from pictures and their captions alone{additions}. No boxes, no labels: "
        f"{learned} was learned from the captions."
    )


def _parts_of_softmask_pp(model: SoftMaskPPConfig) -> list[str]:
    return ["text-driven soft masks"] * model.soft_mask + ["a focal contrastive loss"] * (model.gamma > 0)


def _parts_of_sycoca(model: SyCoCaConfig) -> list[str]:
    masked = model.masks == "attentive" and _has_masks(model)
    return ["attentive masks"] * masked + ["text-guided reconstruction"] * model.paints
