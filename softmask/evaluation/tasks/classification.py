"""Accuracy of a fine-tuned image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, predict_all

TOP = (1, 5)


class Classification(Section):
    """Top-1 and top-5; the model has `predict(images)` -> probabilities [B, classes]."""

    name = "classification"
    reads_blank = True

    def run(self, given: Evaluation) -> dict:
        model: Any = given.scorer.model
        names = given.scorer.config.head.names

        def predict(batch: ExampleBatch) -> list[list[int]]:
            return model.predict(batch.images).topk(min(max(TOP), len(names)), dim=1).indices.tolist()

        predictions = predict_all(given.scorer, given.reader, predict, blank=given.blank)
        if given.predictions is not None:
            rows = ({"image": one.record.name, "class": names[one.value[0]]} for one in predictions)
            given.predictions.extend(rows)
        return scores(predictions, classes=len(names))

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = f"top-1 {100 * result['top1']:.1f} %, top-5 {100 * result['top5']:.1f} %"
        return [f"classification, {result['samples']} images of {result['classes']} classes: {shares}"]


def scores(predictions: Sequence[Prediction], *, classes: int) -> dict[str, Any]:
    """The metrics.json section of predictions whose values are the best classes, best first."""
    hits = {k: sum(one.record.target in one.value[:k] for one in predictions) for k in TOP}
    shares = {f"top{k}": hits[k] / max(len(predictions), 1) for k in TOP}
    return {"samples": len(predictions), "classes": classes, **shares, "chance": 1 / classes}
