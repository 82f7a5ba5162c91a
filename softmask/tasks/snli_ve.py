"""SNLI-VE: whether a picture entails a sentence, contradicts it or leaves it open."""

from __future__ import annotations

from softmask.tasks.downstream import FusedClassification


class SnliVeTask(FusedClassification):
    models = {"softmask_pp": "softmask.models.softmask_pp.classifier:SnliVe"}
    reader = "softmask.data.formats.snli_ve:open_snli_ve"
    section = "softmask.evaluation.tasks.snli_ve:SnliVe"
    name = "SNLI-VE"
