"""Accuracy of a task whose answer is one of a few classes, from the classes' probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from softmask.evaluation.readers import Scorer
from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, Predictor, cut_count, cut_lines, predict_all


class LabelSection(Section):
    """A task whose model has `predict(images, input_ids, attention_mask, pictures=)` -> probabilities [B, classes].

    Attributes:
        labels: the classes, in the order of the model's.
        title: the task's name for the terminal.
    """

    labels: Sequence[str]
    title: str

    def run(self, given: Evaluation) -> dict:
        predictions = predict_all(given.scorer, given.reader, self.predictor(given.scorer), by_picture=True)
        if given.predictions is not None:
            given.predictions.extend(map(self.row, predictions))
        return self.scores(predictions) | cut_count(predictions)

    def predictor(self, scorer: Scorer) -> Predictor:
        """The probabilities of all classes."""
        model: Any = scorer.model

        def predict(batch: ExampleBatch) -> list[list[float]]:
            return model.predict(*batch.inputs, pictures=batch.pictures).tolist()

        return predict

    def row(self, one: Prediction) -> dict[str, Any]:
        """One row of the file of predictions."""
        return {"id": one.record.key, "label": self.labels[best(one.value)]}

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        return label_scores(predictions, self.labels)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        return label_lines(result, self.title) + cut_lines(result, length=given.text_length, what="sentences")


def label_scores(predictions: Sequence[Prediction], labels: Sequence[str]) -> dict[str, Any]:
    """The metrics.json section of predictions whose values are lists of probabilities.

    "majority" is the accuracy of always naming the most frequent class; `confusion[i][j]` counts examples of class i
    that were named j. If some examples are marked as unseen, "unseen" has the same of them alone. Without answers there
    is only "samples".
    """
    answered = [one for one in predictions if one.record.target is not None]
    result: dict[str, Any] = {"samples": len(predictions), "labels": list(labels)}
    if len(answered) < len(predictions):
        result["unanswered"] = len(predictions) - len(answered)
    if not answered:
        return result
    result |= _accuracy(answered, len(labels))
    unseen = [one for one in answered if one.record.unseen]
    return result | ({"unseen": {"samples": len(unseen), **_accuracy(unseen, len(labels))}} if unseen else {})


def _accuracy(answered: Sequence[Prediction], classes: int) -> dict[str, Any]:
    confusion = [[0] * classes for _ in range(classes)]
    for one in answered:
        confusion[one.record.target][best(one.value)] += 1
    right = sum(confusion[label][label] for label in range(classes))
    most = max(Counter(one.record.target for one in answered).values())
    return {"accuracy": right / len(answered), "majority": most / len(answered), "confusion": confusion}


def best(probabilities: Sequence[float]) -> int:
    """The number of the largest; of equal ones the first."""
    return max(range(len(probabilities)), key=probabilities.__getitem__)


def label_lines(result: dict[str, Any], task: str) -> list[str]:
    """The section as lines for the terminal."""
    if "accuracy" not in result:
        return [f"{task}: {result['samples']} predictions, no answers to compare with"]
    lines = [_line(result, f"{task}, {result['samples']} examples")]
    if "unseen" in result:
        lines.append("  " + _line(result["unseen"], f"{result['unseen']['samples']} with something unseen"))
    return lines


def _line(result: dict[str, Any], what: str) -> str:
    return f"{what}: accuracy {100 * result['accuracy']:.1f} %, most frequent class {100 * result['majority']:.1f} %"
