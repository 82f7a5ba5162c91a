"""SNLI-VE: accuracy of entailment, neutral and contradiction."""

from __future__ import annotations

from softmask.data.formats.snli_ve import LABELS
from softmask.evaluation.tasks.labels import LabelSection


class SnliVe(LabelSection):
    """Accuracy; the model has `predict(images, input_ids, attention_mask)` -> probabilities [B, 3]."""

    name = "snli_ve"
    labels = LABELS
    title = "SNLI-VE"
