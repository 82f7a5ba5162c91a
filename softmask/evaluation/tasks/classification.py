"""Accuracy of a fine-tuned image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from softmask.evaluation.readers import Scorer
from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, Predictor, predict_all

TOP = (1, 5)


class Classification(Section):
    """Top-1 and top-5; the model has `predict(images)` -> probabilities [B, classes]."""

    name = "classification"

    def run(self, given: Evaluation) -> dict:
        names = given.scorer.config.head.names
        predictions = predict_all(given.scorer, given.reader, self.predictor(given.scorer))
        if given.predictions is not None:
            rows = ({"image": one.record.name, "class": names[one.value[0][0]]} for one in predictions)
            given.predictions.extend(rows)
        return scores(predictions, classes=len(names))

    def predictor(self, scorer: Scorer) -> Predictor:
        """The best classes, best first, each with its probability."""
        model: Any = scorer.model
        count = min(max(TOP), len(scorer.config.head.names))

        def predict(batch: ExampleBatch) -> list[list[tuple[int, float]]]:
            found = model.predict(batch.images)[batch.pictures[:, 0]].topk(count, dim=1)
            rows = zip(found.indices.tolist(), found.values.tolist(), strict=True)
            return [list(zip(*row, strict=True)) for row in rows]

        return predict

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        shares = f"top-1 {100 * result['top1']:.1f} %, top-5 {100 * result['top5']:.1f} %"
        return [f"classification, {result['samples']} images of {result['classes']} classes: {shares}"]


def scores(predictions: Sequence[Prediction], *, classes: int) -> dict[str, Any]:
    """The metrics.json section of predictions whose values are the best classes, best first, each with its
    probability."""
    hits = {k: sum(one.record.target in [c for c, _ in one.value[:k]] for one in predictions) for k in TOP}
    shares = {f"top{k}": hits[k] / max(len(predictions), 1) for k in TOP}
    return {"samples": len(predictions), "classes": classes, **shares, "chance": 1 / classes}
