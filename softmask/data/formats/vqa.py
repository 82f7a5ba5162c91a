"""VQA: answer a question about a picture. Official questions and annotations, and ALBEF's lists.

Official (v2): `{"data_subtype": "train2014", "questions": [{"question_id", "image_id", "question"}]}`, picture
`COCO_train2014_%012d.jpg`; and in a second file, which a test split has not,
`{"data_subtype": "train2014", "annotations": [{"question_id", "answers": [{"answer"} x 10], "answer_type", ...}]}`.
ALBEF's: `[{"question_id", "question", "image": path, "answer": [texts], "dataset": "vqa"}]`, and for Visual Genome
`"answer": text` and `"dataset": "vg"`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from softmask.data.formats.entries import answered, id_of, placed, text_of, usable
from softmask.data.formats.examples import Example, ExampleSource, root_of
from softmask.data.json_files import read_json
from softmask.data.records import DataError, LeftOut

FORMATS = 'VQA\'s {"questions": [...]} or {"annotations": [...]}, or ALBEF\'s list of {"question", "image", "answer"}'
SUBTYPE = re.compile(r"(?:train|val|test(?:-\w+)?)\d{4}")  # train2014, test-dev2015
COCO_FOLDERS = ("", "{s}/", "images/", "images/{s}/", "Images/mscoco/{s}/")  # {s}: the subtype
LIST_FOLDERS: dict[str, tuple[str, ...]] = {
    "vqa": ("", "coco/", "mscoco/", "images/", "vqa/", "Images/mscoco/"),
    "vg": ("", "vg/", "visual_genome/", "visual-genome/", "VG_100K/", "images/"),
}
TYPES = ("answer_type", "question_type")


def open_vqa(paths: Sequence[str], *, image_root: str = "") -> ExampleSource:
    """The questions of any number of files, told apart by their content.

    The target is {"answers": texts as in the file, "dataset": "vqa" or "vg"}, with "answer_type" and "question_type"
    where they are given; None without answers. If a subtype has annotations, its questions without one are left out.

    Raises:
        DataError: a file of another kind, annotations without questions, or no usable question.
    """
    left_out = {path: LeftOut() for path in paths}
    folder = root_of(paths, image_root)
    trees = {path: read_json(path) for path in paths}
    annotations: dict[str, dict[int | str, dict[str, Any]]] = {}
    for path, tree in trees.items():
        if _holds(tree, "annotations"):
            annotations.setdefault(_subtype(path, tree), {}).update(_annotations(tree, left_out[path]))
    asked = {_subtype(path, tree) for path, tree in trees.items() if _holds(tree, "questions")}
    if missing := sorted(annotations.keys() - asked):
        raise DataError(f"annotations of {missing[0]} without its questions: name the file of questions, too")
    examples: list[Example] = []
    for path, tree in trees.items():
        if _holds(tree, "questions"):
            subtype = _subtype(path, tree)
            examples += _official(tree["questions"], subtype, annotations.get(subtype), folder, left_out[path])
        elif isinstance(tree, list):
            examples += _listed(tree, folder, left_out[path])
        elif not _holds(tree, "annotations"):
            raise DataError(f"{path}: expected {FORMATS}, got {_describe(tree)}")
    return ExampleSource(examples, paths=paths, image_root=image_root, left_out=left_out)


def read_answer_list(path: str) -> list[str]:
    """ALBEF's `answer_list.json`, the answers that a model chooses from.

    Raises:
        DataError: not a list of different texts.
    """
    answers = read_json(path)
    if not isinstance(answers, list) or not answers:
        raise DataError(f'{path}: expected a list of answers ["yes", "no", ...], got {_describe(answers)}')
    first: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(f"{path}: expected texts, entry {number} is {answer!r:.80}")
        if first.setdefault(answer, number) != number:
            raise DataError(f"{path}: {answer!r} is entry {first[answer]} and entry {number}; remove one")
    return answers


def _describe(tree: Any) -> str:
    if isinstance(tree, dict):
        return f"an object with {', '.join(tree)!r:.80}"
    return "an empty list" if tree == [] else type(tree).__name__


def _holds(tree: Any, key: str) -> bool:
    return isinstance(tree, dict) and isinstance(tree.get(key), list)


def _subtype(path: str, tree: dict[str, Any]) -> str:
    """Of the file, or else of its name, v2_OpenEnded_mscoco_train2014_questions.json."""
    subtype = tree.get("data_subtype")
    if isinstance(subtype, str) and SUBTYPE.fullmatch(subtype):
        return subtype
    if named := SUBTYPE.search(os.path.basename(path)):
        return named[0]
    raise DataError(f'{path}: expected "data_subtype" such as train2014, got {subtype!r:.80}; add it to the file')


def _annotations(tree: dict[str, Any], left_out: LeftOut) -> dict[int | str, dict[str, Any]]:
    return dict(usable(tree["annotations"], _annotation, left_out))


def _annotation(entry: dict[str, Any], _number: int) -> tuple[int | str, dict[str, Any]]:
    answers = entry.get("answers")
    if not isinstance(answers, list) or not all(isinstance(one, dict) for one in answers):
        raise ValueError(f'"answers" must be a list of {{"answer": text}}, got {answers!r:.80}')
    return id_of(entry, "question_id"), _target(entry, [one.get("answer") for one in answers], "vqa")


def _target(entry: dict[str, Any], answers: Any, dataset: str) -> dict[str, Any]:
    """Raises ValueError if the answers are not texts."""
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"the answers must be texts, got {answers!r:.80}")
    return {"answers": answers, "dataset": dataset} | {key: entry[key] for key in TYPES if key in entry}


def _official(
    questions: list[Any],
    subtype: str,
    annotations: dict[int | str, dict[str, Any]] | None,
    folder: str,
    left_out: LeftOut,
) -> Iterator[Example]:
    pictures = re.sub(r"-\w+?(?=\d{4}$)", "", subtype)  # test-dev2015 asks about pictures of test2015
    starts = [start.format(s=pictures) for start in COCO_FOLDERS]

    def example(entry: dict[str, Any], _number: int) -> Example:
        key, image = id_of(entry, "question_id"), entry.get("image_id")
        if isinstance(image, bool) or not isinstance(image, int):
            raise ValueError(f'"image_id" must be a number, got {image!r:.80}')
        if annotations is not None and key not in annotations:
            raise ValueError(f"question {key} has no annotation")
        target = annotations[key] if annotations is not None else None
        picture, question = f"COCO_{pictures}_{image:012d}.jpg", text_of(entry, "question")
        return Example((picture,), question, target, key, entry.get("unseen") is True)

    return placed([(one, starts) for one in usable(questions, example, left_out)], folder)


def _listed(entries: list[Any], folder: str, left_out: LeftOut) -> Iterator[Example]:
    made = answered(usable(entries, _listed_example, left_out), left_out)
    # Both data sets have a folder of their own.
    found = {starts: placed([pair for pair in made if pair[1] == starts], folder) for starts in LIST_FOLDERS.values()}
    return (next(found[tuple(starts)]) for _, starts in made)


def _listed_example(entry: dict[str, Any], number: int) -> tuple[Example, Sequence[str]]:
    """The example, and the possible starts of its picture's path. Raises ValueError for an unusable entry."""
    dataset, answers = entry.get("dataset", "vqa"), entry.get("answer")
    if dataset not in tuple(LIST_FOLDERS):
        raise ValueError(f'"dataset" must be {" or ".join(LIST_FOLDERS)}, got {dataset!r:.80}')
    answers = [answers] if isinstance(answers, str) else answers
    target = None if answers is None else _target(entry, answers, dataset)
    key, unseen = entry.get("question_id", number), entry.get("unseen") is True
    return Example((text_of(entry, "image"),), text_of(entry, "question"), target, key, unseen), LIST_FOLDERS[dataset]
