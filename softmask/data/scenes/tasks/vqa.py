"""Questions in VQA v2's official format: `vqa_{train,val,test}_{questions,annotations}.json`.

| question_type | example | answers |
|---|---|---|
| how many | how many owls are there? | 0 to 4, each as often for every concept |
| is there | is there an owl? | yes or no, for concepts that are equally likely |
| what is above, ... | what is to the left of the owl? | a concept's name; nothing else is or may seem to be there |
| is the | is the owl above the cherries? | yes or no; no where the cherries are above the owl |
| what color is the | what color is the background? | a colour |
| what background is | what background is behind the owl? | a colour, with the pattern if it is one with a name |

Answers of ten people: in a third of the questions one to four of them put it otherwise. Questions about left and right
need `data.flip: false`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Any

from softmask.data.scenes.captions import Group, name_one
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.layout import Split
from softmask.data.scenes.tasks import words
from softmask.data.scenes.tasks.answers import answers_of_ten, variants_of
from softmask.data.scenes.tasks.families import Kind
from softmask.data.scenes.tasks.relations import RELATIONS, Relation, is_clearly, is_possibly
from softmask.data.scenes.tasks.scenes import SUBTYPES, Shown
from softmask.data.scenes.tasks.unseen import are_unseen

_TRIES = 100  # to find a concept that a picture does not show


@dataclass(frozen=True)
class Question:
    """``named``: the concepts in question and answer; ``others``: other ways to say the answer."""

    text: str
    question_type: str
    answer: str
    others: tuple[str, ...]
    named: tuple[Concept, ...] = ()

    @property
    def answer_type(self) -> str:
        if self.answer in ("yes", "no"):
            return "yes/no"
        return "number" if self.answer.isdigit() else "other"


Elsewhere = Mapping[tuple[Kind, bool], Sequence[Shown]]
"""The pictures of a split by kind of their families and whether these are unseen."""


def vqa_files(split: Split, shown: Sequence[Shown], seed: int) -> dict[str, Any]:
    """Name -> content of the two files of a split."""
    elsewhere = by_family(shown)
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for one in shown:
        rng = Random(f"{seed}/tasks/vqa/{one.image_id}")
        for number, asked in enumerate(ask(one, elsewhere, rng)):
            ids = {"image_id": one.image_id, "question_id": one.image_id * 1000 + number}
            mark = {"unseen": True} if one.unseen or are_unseen(asked.named) else {}
            questions.append({**ids, "question": asked.text, **mark})
            annotations.append({
                "question_type": asked.question_type,
                "multiple_choice_answer": asked.answer,
                "answers": answers_of_ten(asked.answer, asked.others, rng),
                **ids,
                "answer_type": asked.answer_type,
                **mark,
            })  # fmt: skip
    about = {
        "data_type": "scenes",
        "data_subtype": SUBTYPES[split],
        "license": {},
        "info": {"description": "softmask's scenes"},
    }
    return {
        f"vqa_{split}_questions.json": {**about, "task_type": "Open-Ended", "questions": questions},
        f"vqa_{split}_annotations.json": {**about, "annotations": annotations},
    }


def by_family(shown: Iterable[Shown]) -> Elsewhere:
    found: dict[tuple[Kind, bool], list[Shown]] = {}
    for one in shown:
        found.setdefault((one.family.kind, one.family.unseen), []).append(one)
    return found


def ask(one: Shown, elsewhere: Elsewhere, rng: Random) -> Iterator[Question]:
    """Questions about a picture, with a single true answer each."""
    yield from _how_many(one, rng)
    yield from _is_there(one, elsewhere, rng)
    yield from _what_is(one, rng)
    yield from _is_placed(one, rng)
    yield _background(one, rng)


def _how_many(one: Shown, rng: Random) -> Iterator[Question]:
    concept = concepts()[one.family.one]
    group = one.of(concept)
    # Each of 1 to 4 is the number in three of four families; so shall be 0, which is in all of them.
    if one.family.kind != "count" or (group is None and rng.random() < 0.25):
        return
    count = len(group.boxes) if group else 0
    ending = rng.choice(("are there?", "are there?", "are in the picture?", "can you see?"))
    word = words.NUMBERS[count] if count else "none"
    yield Question(f"how many {words.many(concept)} {ending}", "how many", str(count), (word,), (concept,))


def _is_there(one: Shown, elsewhere: Elsewhere, rng: Random) -> Iterator[Question]:
    answer = rng.choice(("yes", "no"))
    asked = rng.choice(_focus(one)) if answer == "yes" else _absent(one, elsewhere, rng)
    if asked is None:
        return
    start = "are there" if asked.form == "some" and words.is_plural(asked) else "is there"
    what = f"any {asked.name}" if asked.form == "some" else name_one(asked)
    ending = rng.choice(("", "", " in the picture"))
    others = ("yeah", "yes there is") if answer == "yes" else ("nope", "none")
    yield Question(f"{start} {what}{ending}?", "is there", answer, others, (asked,))


def _focus(one: Shown) -> list[Concept]:
    """Concepts of the family's focus that the picture shows: at least one."""
    return [concept for concept in (concepts()[i] for i in one.family.focus) if one.of(concept)]


def _absent(one: Shown, elsewhere: Elsewhere, rng: Random) -> Concept | None:
    """A concept that this picture does not show, drawn as `_focus` of another one of the same kind of family.

    Absent and present concepts are equally likely, so that a question does not tell its answer.
    """
    pictures = elsewhere[one.family.kind, one.family.unseen]
    for _ in range(_TRIES):
        concept = rng.choice(_focus(rng.choice(pictures)))
        if one.of(concept) is None and (one.family.unseen or not are_unseen((*one.concepts, concept))):
            return concept
    return None


def _what_is(one: Shown, rng: Random) -> Iterator[Question]:
    facts = [fact for fact in _facts(one) if not _is_contested(one, *fact)]
    if not facts:
        return
    found, relation, known = rng.choice(facts)
    what, answer = f"what is {words.PLACES[relation]}", found.concept
    others = (name_one(answer), words.the(answer), *variants_of(answer))
    yield Question(f"{what} {words.the(known.concept)}?", what, answer.name, others, (answer, known.concept))


def _is_placed(one: Shown, rng: Random) -> Iterator[Question]:
    facts = _facts(one)
    if not facts:
        return
    first, relation, second = rng.choice(facts)
    answer = rng.choice(("yes", "no"))
    if answer == "no":
        first, second = second, first
    text = f"{words.be(first.concept)} {words.the(first.concept)} {words.PLACES[relation]} {words.the(second.concept)}?"
    others = ("yeah", "yes it is") if answer == "yes" else ("nope", "no it is not")
    yield Question(text, "is the", answer, others, (first.concept, second.concept))


def _facts(one: Shown) -> list[tuple[Group, Relation, Group]]:
    """What is clear of two concepts with one drawing each."""
    singles = [group for group in one.groups if len(group.boxes) == 1]
    return [
        (first, relation, second)
        for first, second in permutations(singles, 2)
        for relation in RELATIONS
        if is_clearly(first, relation, second)
    ]


def _is_contested(one: Shown, first: Group, relation: Relation, second: Group) -> bool:
    """Whether somebody might name another concept than ``first``."""
    return any(is_possibly(group, relation, second) for group in one.groups if group not in (first, second))


def _background(one: Shown, rng: Random) -> Question:
    color, name = one.color, one.background.name
    shades = ("grey", "light grey") if color == "gray" else (f"light {color}", f"dark {color}")
    if rng.random() < 0.5:
        return Question("what color is the background?", "what color is the", color, shades)
    group = rng.choice(one.groups)
    what = words.the(group.concept) if len(group.boxes) == 1 else f"the {words.many(group.concept)}"
    others = shades if name == color else (color, f"{color} and {name.removesuffix(color).strip()}")
    return Question(f"what background is behind {what}?", "what background is", name, others, (group.concept,))
