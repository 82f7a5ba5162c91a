"""VQA: accuracy of chosen or generated answers, by the official formula."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from softmask.data import DataError, TokenBatch
from softmask.data.formats.vqa import read_answer_list
from softmask.evaluation.readers import Scorer
from softmask.evaluation.sections import Evaluation, Section
from softmask.evaluation.tasks.examples import ExampleBatch, Prediction, Predictor, cut_count, cut_lines, predict_all
from softmask.evaluation.tasks.vqa_accuracy import vqa_accuracy
from softmask.tasks.vqa import texts_over

TYPES = ("answer_type", "question_type")
Answers = list[tuple[str, float | None]]
"""Answers to a question, best first, each with its log-probability if it is known."""


class Vqa(Section):
    """VQA accuracy, also by types of answers and questions.

    With `head.answer_list` the model ranks its answers: `list_answers`, `read_questions` and `rank` -> (numbers,
    log-probabilities), best first. Without it the model writes them: `generate` -> token ids; "too_long" then counts
    the different true answers that have more tokens than it may write.
    """

    name = "vqa"

    def run(self, given: Evaluation) -> dict:
        predict = self.predictor(given.scorer)
        predictions = predict_all(given.scorer, given.reader, predict, by_picture=True)
        if given.predictions is not None:
            rows = {one.index: {"question_id": one.record.key, "answer": one.value[0][0]} for one in predictions}
            for index in given.reader.skipped:  # the server refuses a file that lacks a question
                rows[index] = {"question_id": given.reader.source.example(index).key, "answer": ""}
            given.predictions.extend(row for _, row in sorted(rows.items()))
        result = scores(predictions) | cut_count(predictions)
        if not given.scorer.config.head.answer_list:
            result |= _too_long(predictions, given.scorer)
        return result

    def predictor(self, scorer: Scorer, *, count: int = 1) -> Predictor:
        """The `count` best answers, best first, each with its log-probability; one without if the model writes it."""
        return _answerer(scorer, count=count)

    def lines(self, result: dict, given: Evaluation) -> list[str]:
        cut = cut_lines(result, length=given.text_length, what="questions")
        if "accuracy" not in result:
            return [f"VQA: {result['samples']} answers, none to compare with", *cut]
        lines = [f"VQA, {result['samples']} questions: {_percent(result)}", *cut]
        if "too_long" in result:
            most = given.scorer.config.head.answer_length
            lines.append(f"  {result['too_long']} true answers have more than head.answer_length={most} tokens")
        for kind in TYPES:
            shares = [f"{name} {100 * one['accuracy']:.1f} %" for name, one in result.get(kind, {}).items()]
            lines += [f"  {', '.join(shares)}"] if shares else []
        if "unseen" in result:
            unseen = result["unseen"]
            lines.append(f"  {unseen['samples']} with something unseen: {_percent(unseen)}")
        return lines


def _percent(result: dict) -> str:
    return f"accuracy {100 * result['accuracy']:.2f} %, most frequent answer {100 * result['majority']:.2f} %"


def _answerer(scorer: Scorer, *, count: int) -> Callable[[ExampleBatch], list[Answers]]:
    model: Any = scorer.model
    head, device = scorer.config.head, scorer.device

    if not head.answer_list:

        def write(batch: ExampleBatch) -> list[Answers]:
            ids = model.generate(*batch.inputs, picture=batch.pictures[:, 0], max_length=head.answer_length)
            return [[(text, None)] for text in scorer.tokenizer.decode(ids)]

        return write
    answers = read_answer_list(head.answer_list)
    tokens = scorer.tokenizer(answers, max_length=head.answer_length)
    _check_answers(answers, tokens, head.answer_list, head.answer_length)
    listed = model.list_answers(tokens.input_ids.to(device), tokens.attention_mask.to(device))

    def rank(batch: ExampleBatch) -> list[Answers]:
        read = model.read_questions(*batch.inputs, picture=batch.pictures[:, 0])
        numbers, log_probability = model.rank(read, listed, k=head.k)
        best = zip(numbers[:, :count].tolist(), log_probability[:, :count].tolist(), strict=True)
        return [[(answers[number], value) for number, value in zip(*row, strict=True)] for row in best]

    return rank


def _too_long(predictions: Sequence[Prediction], scorer: Scorer) -> dict[str, int]:
    """For the result: how many different true answers cannot be written; empty if there are none."""
    targets = [one.record.target for one in predictions if one.record.target is not None]
    answers = {answer for target in targets for answer in target["answers"]}
    cut = list(texts_over(answers, scorer.tokenizer, length=scorer.config.head.answer_length))
    return {"too_long": len(cut)} if cut else {}


def _check_answers(answers: Sequence[str], tokens: TokenBatch, path: str, length: int) -> None:
    """DataError for answers that are cut, or that the model cannot tell apart."""
    if long := [answer for answer, cut in zip(answers, tokens.cut.tolist(), strict=True) if cut]:
        raise DataError(
            f"{path}: {len(long)} answers have more than head.answer_length={length} tokens, such as {long[0]!r}"
        )
    first: dict[tuple[int, ...], str] = {}
    for answer, ids in zip(answers, tokens.input_ids.tolist(), strict=True):
        if (other := first.setdefault(tuple(ids), answer)) != answer:
            raise DataError(f"{path}: the tokenizer reads {other!r} and {answer!r} as the same tokens; remove one")


def scores(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The metrics.json section: "accuracy", and "majority", the accuracy of always giving the most frequent answer; the
    same by types, and of the questions with something unseen."""
    result: dict[str, Any] = {"samples": len(predictions)}
    answered = [one for one in predictions if one.record.target is not None]
    if len(answered) < len(predictions):
        result["unanswered"] = len(predictions) - len(answered)
    if not answered:
        return result
    right = {one.index: vqa_accuracy(one.value[0][0], one.record.target["answers"]) for one in answered}
    result |= _shares(right, answered)
    for kind in TYPES:
        groups: dict[str, list[Prediction]] = defaultdict(list)
        for one in answered:
            if kind in one.record.target:
                groups[one.record.target[kind]].append(one)
        parts = {name: {"samples": len(ones), **_shares(right, ones)} for name, ones in sorted(groups.items())}
        result |= {kind: parts} if parts else {}
    unseen = [one for one in answered if one.record.unseen]
    return result | ({"unseen": {"samples": len(unseen), **_shares(right, unseen)}} if unseen else {})


def _shares(right: dict[int, float], ones: Sequence[Prediction]) -> dict[str, float]:
    answers = [one.record.target["answers"] for one in ones]
    ((most, _),) = Counter(answer for some in answers for answer in some).most_common(1)
    return {
        "accuracy": fmean(right[one.index] for one in ones),
        "majority": fmean(vqa_accuracy(most, some) for some in answers),
    }
