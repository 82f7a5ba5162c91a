"""VQA: accuracy by types of answers and questions, and examples with the best answers."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from softmask.data import Record
from softmask.evaluation.readers import Scorer
from softmask.evaluation.tasks.examples import Prediction, Predictor
from softmask.evaluation.tasks.vqa import TYPES
from softmask.evaluation.tasks.vqa_accuracy import vqa_accuracy
from softmask.report.metrics_file import Each, Maybe
from softmask.report.page import percent, section, tile
from softmask.report.tasks.cards import Guess
from softmask.report.tasks.examples import ExampleView
from softmask.report.tasks.figures import Group, Row, share_table, with_grey
from softmask.report.tasks.labels import UNSEEN, note

ANSWERS = 5  # of the model
PEOPLES = 3  # different answers of people
MAJORITY = "Most frequent answer"
RIGHT = 0.5  # VQA accuracy from which an answer is shown as right
PART = {"samples": int, "accuracy": float, "majority": float}


class VqaView(ExampleView):
    """Accuracy beside that of grey pictures and of the most frequent answer, by types, and examples with the answers
    that the model ranks first."""

    specification = {
        "samples": int,
        "accuracy": Maybe(float),
        "majority": Maybe(float),
        "unseen": Maybe(PART),
        **{kind: Maybe(Each(PART)) for kind in TYPES},
    }
    explained = "the log-probability of the most probable first token of an answer"

    def tiles(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        if result.get("accuracy") is None:
            return []
        shown = [tile(percent(result["accuracy"]), "VQA accuracy", f"{result['samples']:,} questions")]
        if blank is not None:
            shown.append(tile(percent(blank["accuracy"]), "Grey pictures", "what the questions alone tell"))
        if unseen := result.get("unseen"):
            shown.append(tile(percent(unseen["accuracy"]), "With something unseen", f"{unseen['samples']:,} questions"))
        return shown

    def figures(self, result: dict[str, Any], blank: dict[str, Any] | None) -> list[str]:
        if result.get("accuracy") is None:
            return [section("task", "VQA", f"{result['samples']:,} questions without answers.", "")]
        groups = [Group("", [_row("All", result, blank)])]
        if unseen := result.get("unseen"):
            row = _row(UNSEEN, unseen, (blank or {}).get("unseen"))
            groups[0].rows.append(row)
        for kind in TYPES:
            grey = (blank or {}).get(kind, {})
            rows = [_row(name, found, grey.get(name)) for name, found in (result.get(kind) or {}).items()]
            groups += [Group(f"By {kind.replace('_', ' ')}", rows)] if rows else []
        about = f"{note(blank)} An answer counts as far as people give it: fully from three of ten on."
        return [section("task", "VQA", about, share_table(groups, head="Part of the data", column="Accuracy"))]

    def predictor(self, scorer: Scorer) -> Predictor:
        return self.section.predictor(scorer, count=ANSWERS)

    def guesses(self, scorer: Scorer, one: Prediction) -> list[Guess]:
        people = None if one.record.target is None else one.record.target["answers"]
        return [
            Guess(
                text or "(no answer)",
                None if log_probability is None else math.exp(log_probability),
                None if people is None else vqa_accuracy(text, people) >= RIGHT,
            )
            for text, log_probability in one.value
        ]

    def answer(self, scorer: Scorer, record: Record) -> str:
        counts = Counter(record.target["answers"])
        if len(counts) == 1:
            return next(iter(counts))
        return ", ".join(f"{text} ({count} of {counts.total()})" for text, count in counts.most_common(PEOPLES))


def _row(name: str, found: dict[str, Any], grey: dict[str, Any] | None) -> Row:
    return Row(name, found["samples"], found["accuracy"], with_grey({MAJORITY: found["majority"]}, grey))
