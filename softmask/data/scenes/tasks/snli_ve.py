"""Hypotheses in ALBEF's format of SNLI-VE: `snli_ve_{train,val,test}.json`.

* entailment: the picture shows what the hypothesis says;
* contradiction: it shows what the hypothesis is about, but otherwise: another number of owls, elsewhere, on another
  colour;
* neutral: it does not show the concept, or one of the two, that the hypothesis is about, so nobody can tell. "There are
  three owls" is neutral of a picture without owls.

Numbers are exact. Every hypothesis occurs once with each label, about three pictures of a family. Hypotheses about left
and right need `data.flip: false`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.layout import Split
from softmask.data.scenes.tasks import words
from softmask.data.scenes.tasks.families import MEMBERS
from softmask.data.scenes.tasks.relations import OPPOSITE, Relation
from softmask.data.scenes.tasks.scenes import Shown
from softmask.data.scenes.tasks.unseen import are_unseen

LABELS = ("entailment", "contradiction", "neutral")


@dataclass(frozen=True)
class Hypothesis:
    """``members`` of the family, for each of LABELS one."""

    text: str
    members: tuple[int, int, int]
    named: tuple[Concept, ...]


def snli_ve_files(split: Split, shown: Sequence[Shown], seed: int) -> dict[str, Any]:
    """Name -> content of the file of a split."""
    entries: list[dict[str, Any]] = []
    for start in range(0, len(shown), MEMBERS):
        family = shown[start : start + MEMBERS]
        for one in suppose(family, Random(f"{seed}/tasks/snli_ve/{family[0].image_id}")):
            for label, member in zip(LABELS, one.members, strict=True):
                picture = family[member]
                mark = {"unseen": True} if picture.unseen or are_unseen(one.named) else {}
                entries.append({"image": picture.path, "sentence": one.text, "label": label, **mark})
    return {f"snli_ve_{split}.json": entries}


def suppose(family: Sequence[Shown], rng: Random) -> Iterator[Hypothesis]:
    """Two hypotheses about the four pictures of a family."""
    kind = family[0].family.kind
    return {"count": _counts, "place": _places, "background": _backgrounds}[kind](family, rng)


def _counts(family: Sequence[Shown], rng: Random) -> Iterator[Hypothesis]:
    concept = concepts()[family[0].family.one]
    first, second = rng.sample(range(3), 2)
    for entailed, contradicted in ((first, second), (second, first)):
        group = family[entailed].of(concept)
        assert group is not None
        count = len(group.boxes)
        what, be = words.counted(concept, count), "is" if count == 1 else "are"
        text = rng.choice((f"there {be} {what}", f"the picture shows {what}", f"{what} can be seen"))
        yield Hypothesis(text, (entailed, contradicted, 3), (concept,))


def _places(family: Sequence[Shown], rng: Random) -> Iterator[Hypothesis]:
    plan = family[0].family
    relation = plan.relation
    assert relation is not None
    for entailed, contradicted in ((0, 1), (1, 0)):
        upper, lower = (concepts()[i] for i in (plan.focus if entailed == 0 else reversed(plan.focus)))
        text = _place(upper, relation, lower) if rng.random() < 0.5 else _place(lower, OPPOSITE[relation], upper)
        # Side by side is otherwise, too.
        yield Hypothesis(text, (entailed, contradicted if rng.random() < 0.7 else 3, 2), (upper, lower))


def _place(first: Concept, relation: Relation, second: Concept) -> str:
    return f"{words.the(first)} {words.be(first)} {words.PLACES[relation]} {words.the(second)}"


def _backgrounds(family: Sequence[Shown], rng: Random) -> Iterator[Hypothesis]:
    concept, (same, other) = concepts()[family[0].family.one], rng.sample((0, 3), 2)
    for entailed, contradicted in ((same, 1), (1, other)):
        where = words.on_background(family[entailed].color)
        how = rng.choice(("on", "in front of"))
        yield Hypothesis(
            f"{words.the(concept)} {words.be(concept)} {how} {where}", (entailed, contradicted, 2), (concept,)
        )
