"""NLVR2: accuracy, and the share of sentences whose examples are all answered rightly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from softmask.data.formats.nlvr2 import sentence_of
from softmask.evaluation.sections import Evaluation
from softmask.evaluation.tasks.examples import Prediction
from softmask.evaluation.tasks.labels import LabelSection, best

LABELS = ("False", "True")


class Nlvr2(LabelSection):
    """Accuracy and consistency; the model as in `LabelSection`, with two probabilities."""

    name = "nlvr2"
    labels = LABELS
    title = "NLVR2"

    def row(self, one: Prediction) -> dict[str, Any]:
        return {"identifier": one.record.key, "label": LABELS[best(one.value)]}

    def scores(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        result = super().scores(predictions)
        sentences: dict[str, list[bool]] = defaultdict(list)
        for one in predictions:
            if isinstance(one.record.key, str) and one.record.target is not None:  # official identifiers
                sentences[sentence_of(one.record.key)].append(best(one.value) == one.record.target)
        return result | ({"consistency": sum(map(all, sentences.values())) / len(sentences)} if sentences else {})

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        more = [f"  consistency {100 * result['consistency']:.1f} %"] if "consistency" in result else []
        return super().lines(result, given) + more
