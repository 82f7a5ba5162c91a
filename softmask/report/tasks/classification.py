"""Fine-tuned classification: top-1 and top-5, and examples with the best classes."""

from __future__ import annotations

from typing import Any

from softmask.data import Record
from softmask.evaluation.readers import Scorer
from softmask.evaluation.tasks.examples import Prediction
from softmask.report.page import percent, section, tile
from softmask.report.tasks.cards import Guess
from softmask.report.tasks.examples import ExampleView
from softmask.report.tasks.figures import Group, Row, share_table, with_grey
from softmask.report.tasks.labels import note


class ClassificationView(ExampleView):
    """A confusion matrix of hundreds of classes would not be readable; the examples show what is confused."""

    specification = {"samples": int, "classes": int, "top1": float, "top5": float, "chance": float}

    def tiles(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        detail = f"{result['classes']:,} classes, chance {percent(result['chance'])} %"
        top5 = tile(percent(result["top5"]), "Top-5", f"{result['samples']:,} images")
        return [tile(percent(result["top1"]), "Top-1", detail), top5]

    def figures(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        classes = result["classes"]
        chances = {"top1": result["chance"], "top5": min(1.0, 5 * result["chance"])}
        rows = []
        for key, name in (("top1", "Top-1"), ("top5", "Top-5")):
            others = with_grey({"Chance": chances[key]}, blank, key=key)
            rows.append(Row(name, result["samples"], result[key], others))
        table = share_table([Group("", rows)], head=f"{classes:,} classes", column="Accuracy")
        return [section("task", "Classification", note(blank), table)]

    def guesses(self, scorer: Scorer, one: Prediction) -> list[Guess]:
        names = scorer.config.head.names
        return [Guess(names[number], share, number == one.record.target) for number, share in one.value]

    def answer(self, scorer: Scorer, record: Record) -> str:
        return scorer.config.head.names[record.target]
