"""SNLI-VE, NLVR2, and other tasks whose answer is one of a few classes."""

from __future__ import annotations

from typing import Any

from softmask.data import Record
from softmask.evaluation.readers import Scorer
from softmask.evaluation.tasks.examples import Prediction
from softmask.report.metrics_file import Counts, Maybe
from softmask.report.page import percent, section, tile
from softmask.report.tasks.cards import Guess
from softmask.report.tasks.examples import ExampleView
from softmask.report.tasks.figures import Group, Row, confusion_table, share_table, with_grey

UNSEEN = "With something unseen in training"
MAJORITY = "Majority"


class LabelView(ExampleView):
    """Accuracy beside its baselines, the confusion matrix, and examples with all classes' probabilities."""

    explained = "the predicted class's logit"

    @property
    def needed(self) -> dict[str, Any]:
        figures = {"samples": int, "accuracy": Maybe(float), "majority": Maybe(float)}
        matrix = Counts(len(self.section.labels))
        unseen = Maybe({"samples": int, "accuracy": float, "majority": float})
        return {
            self.section.name: figures | {"confusion": Maybe(matrix), "unseen": unseen, "consistency": Maybe(float)}
        }

    def tiles(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        if result.get("accuracy") is None:
            return []
        detail = f"most frequent class {percent(result['majority'])} %"
        shown = [tile(percent(result["accuracy"]), "Accuracy", detail)]
        if blank is not None:
            shown.append(tile(percent(blank["accuracy"]), "Grey pictures", "what the texts alone tell"))
        if unseen := result.get("unseen"):
            shown.append(tile(percent(unseen["accuracy"]), "With something unseen", f"{unseen['samples']:,} examples"))
        if result.get("consistency") is not None:
            shown.append(tile(percent(result["consistency"]), "Consistency", "sentences with all examples right"))
        return shown

    def figures(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        if result.get("accuracy") is None:
            return [section("task", self.section.title, f"{result['samples']:,} examples without answers.", "")]
        about = f"{note(blank)} The majority is the share of the most frequent class."
        return [section("task", self.section.title, about, self.table(result, blank) + self.matrix(result))]

    def table(self, result: dict[str, Any], blank: dict[str, Any] | None) -> str:
        def row(name: str, found: dict[str, Any], grey: dict[str, Any] | None) -> Row:
            others = with_grey({MAJORITY: found["majority"]}, grey)
            return Row(name, found["samples"], found["accuracy"], others)

        rows = [row("All", result, blank)]
        if unseen := result.get("unseen"):
            rows.append(row(UNSEEN, unseen, blank and blank.get("unseen")))
        return share_table([Group("", rows)], head="Part of the data", column="Accuracy")

    def matrix(self, result: dict[str, Any]) -> str:
        counts = result.get("confusion")
        return "" if counts is None else confusion_table(counts, self.section.labels)

    def guesses(self, scorer: Scorer, one: Prediction) -> list[Guess]:
        target, order = one.record.target, sorted(range(len(one.value)), key=lambda label: -one.value[label])
        return [
            Guess(self.section.labels[label], one.value[label], None if target is None else label == target)
            for label in order
        ]

    def answer(self, scorer: Scorer, record: Record) -> str:
        return self.section.labels[record.target]


class PairView(LabelView):
    """The same of two pictures."""

    pictures = ("left", "right")


def note(blank: dict[str, Any] | None) -> str:
    """What the columns mean."""
    grey = " With grey pictures the same model reads the texts alone." if blank is not None else ""
    return f"Shares of examples that are answered rightly, in percent.{grey}"
