"""Texts of the scenes' tasks: true of the pictures, of no use without them, and without what is kept for test."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import combinations
from typing import Any

import pytest

from softmask.data.scenes.captions import Box, Group
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.layout import held_out
from softmask.data.scenes.tasks.captions import captions_file
from softmask.data.scenes.tasks.nlvr2 import nlvr2_files
from softmask.data.scenes.tasks.relations import RELATIONS, is_clearly, is_possibly
from softmask.data.scenes.tasks.scenes import FIRST_ID, Shown, sample
from softmask.data.scenes.tasks.snli_ve import LABELS, snli_ve_files
from softmask.data.scenes.tasks.unseen import is_unseen
from softmask.data.scenes.tasks.vqa import vqa_files
from tests.data.scenes import truth

SPLITS = ("train", "val", "test")
SCENES, LOOKED_AT = 800, 160  # per split
HANDS = (("openmoji",),)
BY_NAME = {concept.name: concept for concept in concepts()}
NOUNS = re.compile(rf"\b({'|'.join(sorted(truth.names(), key=len, reverse=True))})\b")


@pytest.fixture(scope="module")
def shown() -> dict[str, list[Shown]]:
    return {split: [sample(split, n, seed=0, hands=HANDS)[1] for n in range(SCENES)] for split in SPLITS}


@pytest.fixture(scope="module")
def files(shown) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for split in SPLITS:
        for write in (vqa_files, nlvr2_files, snli_ve_files):
            made |= write(split, shown[split], 0)
    return made | captions_file([one for split in SPLITS for one in shown[split]], 0)


@cache
def picture(image_id: int) -> truth.Picture:
    split = next(split for split in reversed(SPLITS) if image_id >= FIRST_ID[split])
    return truth.look(sample(split, image_id - FIRST_ID[split], seed=0, hands=HANDS)[0])


def id_of(path: str) -> int:
    return int(re.fullmatch(r"images/COCO_(?:train2014|val2014|test2015)_(\d{12})\.jpg", path)[1])


def is_looked_at(*image_ids: int) -> bool:
    return all(image_id % 10**6 < LOOKED_AT for image_id in image_ids)


def asked(files: dict[str, Any], split: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Questions with their annotations."""
    questions, annotations = files[f"vqa_{split}_questions.json"], files[f"vqa_{split}_annotations.json"]
    return zip(questions["questions"], annotations["annotations"], strict=True)


def entries(files: dict[str, Any], split: str) -> Iterator[tuple[str, list[int], dict[str, Any]]]:
    """Texts, numbers of the pictures and entries of all tasks."""
    for question, annotation in asked(files, split):
        assert question.get("unseen") == annotation.get("unseen")
        yield f"{question['question']} {annotation['multiple_choice_answer']}", [question["image_id"]], question
    for entry in files[f"nlvr2_{split}.json"]:
        yield entry["sentence"], [id_of(path) for path in entry["images"]], entry
    for entry in files[f"snli_ve_{split}.json"]:
        yield entry["sentence"], [id_of(entry["image"])], entry
    for image in files["captions.json"]["images"]:
        if image["split"] == split:
            yield " / ".join(one["raw"] for one in image["sentences"]), [image["cocoid"]], image


@pytest.mark.parametrize("split", SPLITS)
def test_statements_are_true_or_false_as_labelled(files, split):
    checked = 0
    for entry in files[f"nlvr2_{split}.json"]:
        pair = [id_of(path) for path in entry["images"]]
        if is_looked_at(*pair):
            assert str(truth.statement(entry["sentence"], *map(picture, pair))) == entry["label"], entry
            checked += 1
    assert checked == LOOKED_AT / 4 * 6


@pytest.mark.parametrize("split", SPLITS)
def test_hypotheses_are_labelled_by_the_rule(files, split):
    checked = [entry for entry in files[f"snli_ve_{split}.json"] if is_looked_at(id_of(entry["image"]))]
    for entry in checked:
        assert truth.label(entry["sentence"], picture(id_of(entry["image"]))) == entry["label"], entry
    assert len(checked) == LOOKED_AT / 4 * 6


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_true(files, split):
    checked = Counter()
    for question, annotation in asked(files, split):
        if is_looked_at(question["image_id"]):
            answer = truth.answer(question["question"], picture(question["image_id"]))
            assert answer == annotation["multiple_choice_answer"], question
            checked[annotation["question_type"]] += 1
    assert len(checked) == 9 and min(checked.values()) > 5


def test_captions_are_different_and_name_every_concept(files):
    for image in files["captions.json"]["images"]:
        texts = [one["raw"] for one in image["sentences"]]
        assert len(set(texts)) == 5
        if is_looked_at(image["cocoid"]):
            seen = picture(image["cocoid"])
            for text in texts:
                assert {truth.names()[noun] for noun in NOUNS.findall(text)} == set(seen.boxes), text
                ground = re.search(r"on an? (\w+(?: \w+)?) background", text)
                assert ground is None or ground[1] == seen.background


def majority(answers: Iterable[str]) -> tuple[str, float]:
    counts = Counter(answers)
    (answer, count), *_ = counts.most_common(1)
    return answer, count / counts.total()


@pytest.mark.parametrize("split", SPLITS)
def test_no_answer_is_frequent(files, split):
    by_type = defaultdict(list)
    for _, annotation in asked(files, split):
        by_type[annotation["question_type"]].append(annotation["multiple_choice_answer"])
    assert set(by_type) >= {"how many", "is there", "is the", "what is above", "what is to the left of"}
    for question_type, answers in by_type.items():
        most = 0.6 if set(answers) == {"yes", "no"} else 0.3
        assert majority(answers)[1] <= most, question_type
    assert set(by_type["how many"]) == set("01234")


@pytest.mark.parametrize("split", SPLITS)
def test_every_sentence_has_every_label_equally_often(files, split):
    for name, labels in (("nlvr2", ("True", "False")), ("snli_ve", LABELS)):
        by_text = defaultdict(Counter)
        for entry in files[f"{name}_{split}.json"]:
            by_text[entry["sentence"]][entry["label"]] += 1
        for text, counts in by_text.items():
            assert set(counts) == set(labels) and len(set(counts.values())) == 1, text


def test_false_pairs_show_the_concepts_that_are_named(files):
    """At least one picture of them shows one, and mostly every concept of the sentence is in the pair."""
    whole = []
    for entry in files["nlvr2_train.json"]:
        pair = [id_of(path) for path in entry["images"]]
        if entry["label"] == "False" and is_looked_at(*pair):
            named = {truth.names()[noun] for noun in NOUNS.findall(entry["sentence"])}
            found = {name for image_id in pair for name in picture(image_id).boxes}
            assert not named or named & found, entry
            whole.append(named <= found)
    assert sum(whole) / len(whole) > 0.95


def test_questions_alone_tell_little(files):
    known = defaultdict(Counter)
    for question, annotation in asked(files, "train"):
        known[question["question"]][annotation["multiple_choice_answer"]] += 1
    right = defaultdict(list)
    for question, annotation in asked(files, "test"):
        if question["question"] in known:
            guess = known[question["question"]].most_common(1)[0][0]
            right[annotation["question_type"]].append(guess == annotation["multiple_choice_answer"])
    assert sum(map(len, right.values())) > SCENES
    for question_type, hits in right.items():
        if len(hits) > 50:
            assert sum(hits) / len(hits) < (0.6 if question_type in ("is there", "is the") else 0.35), question_type


def test_ten_people_answer_and_most_agree(files):
    others = Counter()
    for _, annotation in asked(files, "train"):
        answers = Counter(one["answer"] for one in annotation["answers"])
        assert [one["answer_id"] for one in annotation["answers"]] == list(range(1, 11))
        assert answers[annotation["multiple_choice_answer"]] >= 6
        others[10 - answers[annotation["multiple_choice_answer"]]] += 1
        kind = {"yes": "yes/no", "no": "yes/no"}.get(annotation["multiple_choice_answer"])
        kind = kind or ("number" if annotation["question_type"] == "how many" else "other")
        assert annotation["answer_type"] == kind
    assert set(others) == set(range(5)) and 0.25 < 1 - others[0] / others.total() < 0.4


def involved(text: str, image_ids: list[int], shown: dict[int, Shown]) -> bool:
    """Whether a text or one of its pictures has an unseen concept or pair."""
    named = {BY_NAME[truth.names()[noun]] for noun in NOUNS.findall(text)}
    groups = [named, *({group.concept for group in shown[image_id].groups} for image_id in image_ids)]
    return any(any(map(is_unseen, group)) or any(held_out(a, b) for a, b in combinations(group, 2)) for group in groups)


@pytest.mark.parametrize("split", SPLITS)
def test_unseen_concepts_and_pairs_are_in_test_alone_and_marked(files, shown, split):
    assert 0.06 < sum(map(is_unseen, concepts())) / len(concepts()) < 0.1
    by_id = {one.image_id: one for one in shown[split]}
    marked = defaultdict(list)
    for text, image_ids, entry in entries(files, split):
        unseen = involved(text, image_ids, by_id)
        assert entry.get("unseen", False) == unseen, (text, entry)
        marked[tuple(entry)[0]].append(unseen)
    assert len(marked) == 4  # the tasks
    for task, found in marked.items():
        assert 0.15 < sum(found) / len(found) < 0.35 if split == "test" else not any(found), task


def group(*boxes: tuple[float, float, float, float]) -> Group:
    return Group(BY_NAME["owl"], tuple(Box(*box) for box in boxes))


@pytest.mark.parametrize(
    ("relation", "box"),
    [
        ("above", (0.4, 0.05, 0.6, 0.25)),
        ("below", (0.4, 0.75, 0.6, 0.95)),
        ("left", (0.05, 0.4, 0.25, 0.6)),
        ("right", (0.75, 0.4, 0.95, 0.6)),
    ],
)
def test_relations_have_margins(relation, box):
    middle = group((0.4, 0.4, 0.6, 0.6))
    for other in RELATIONS:
        assert is_clearly(group(box), other, middle) == is_possibly(group(box), other, middle) == (other == relation)
    corner = group((0.05, 0.05, 0.25, 0.25))
    for other in RELATIONS:
        assert not is_clearly(corner, other, middle)
        assert is_possibly(corner, other, middle) == (other in ("above", "left"))
    both = group(box, (0.05, 0.05, 0.25, 0.25))
    assert not is_clearly(both, relation, middle) and is_possibly(both, relation, middle)
