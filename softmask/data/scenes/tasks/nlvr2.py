"""Statements about a left and a right picture, in ALBEF's format of NLVR2: `nlvr2_{train,val,test}.json`.

Every statement occurs with a pair of which it is true and with one of which it is false. The false pair is of the same
family, so it differs in a number, a concept, a place or the order of its pictures. Numbers are exact. Statements name
sides: they need `data.flip: false`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from softmask.data.scenes.captions import name_one
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.layout import Split
from softmask.data.scenes.tasks import words
from softmask.data.scenes.tasks.families import MEMBERS
from softmask.data.scenes.tasks.scenes import Shown
from softmask.data.scenes.tasks.unseen import are_unseen

SIMPLE, OTHER = 2, 1  # statements per family, see Statement.simple

Pair = tuple[int, int]


@dataclass(frozen=True)
class Statement:
    """The members of the family in a pair of which the text is true, and in one of which it is false.

    `simple`: whether a thing or a colour is there decides it. The others also ask for numbers and places.
    """

    text: str
    true: Pair
    false: Pair
    named: tuple[Concept, ...] = ()
    simple: bool = False


def nlvr2_files(split: Split, shown: Sequence[Shown], seed: int) -> dict[str, Any]:
    """Name -> content of the file of a split."""
    entries: list[dict[str, Any]] = []
    for start in range(0, len(shown), MEMBERS):
        family = shown[start : start + MEMBERS]
        for one in state(family, Random(f"{seed}/tasks/nlvr2/{family[0].image_id}")):
            for label, pair in (("True", one.true), ("False", one.false)):
                pictures = [family[member] for member in pair]
                unseen = are_unseen(one.named) or any(picture.unseen for picture in pictures)
                mark = {"unseen": True} if unseen else {}
                paths = [picture.path for picture in pictures]
                entries.append({"images": paths, "sentence": one.text, "label": label, **mark})
    return {f"nlvr2_{split}.json": entries}


def state(family: Sequence[Shown], rng: Random) -> list[Statement]:
    """Some statements about the four pictures of a family."""
    kind = family[0].family.kind
    statements = {"count": _counts, "place": _places, "background": _backgrounds}[kind](family, rng)
    simple, other = ([one for one in statements if one.simple == kind] for kind in (True, False))
    return rng.sample(simple, SIMPLE) + rng.sample(other, OTHER)


def _either(pair: Pair, rng: Random) -> Pair:
    """The pair in a random order."""
    return pair if rng.random() < 0.5 else pair[::-1]


def _counts(family: Sequence[Shown], rng: Random) -> list[Statement]:
    one, other = (concepts()[i] for i in family[0].family.focus)
    i, j, k = rng.sample(range(3), 3)
    numbers = [len(group.boxes) if (group := picture.of(one)) else 0 for picture in family]
    rest = family[3].of(other)
    assert rest is not None
    owls, here = words.many(one), words.counted(one, numbers[i])
    more, fewer = (i, j) if numbers[i] > numbers[j] else (j, i)
    side, (at, beyond) = _side(rng)
    return [
        Statement(f"there are {words.NUMBERS[numbers[i] + numbers[j]]} {owls} in the two pictures in all",
                  _either((i, j), rng), _either((i, k), rng), (one,)),
        Statement(f"one picture shows {here} and the other {words.NUMBERS[numbers[j]]}",
                  _either((i, j), rng), _either((i, k), rng), (one,)),
        Statement(f"one picture shows {here} and the other {words.shown(other, len(rest.boxes))}",
                  _either((i, 3), rng), _either((j, 3), rng), (one, other)),
        Statement(f"both pictures show at least one {words.one_of(one)}",
                  _either((i, j), rng), _either((i, 3), rng), (one,), simple=True),
        Statement(f"only the {side} picture shows any {owls}",
                  at((i, 3)), rng.choice((beyond((i, 3)), at((i, j)))), (one,), simple=True),
        Statement(f"the {side} picture shows more {owls} than the other",
                  at((more, fewer)), beyond((more, fewer)), (one,)),
        Statement(f"the {side} picture shows {here}",
                  at((i, j)), rng.choice((beyond((i, j)), at((j, i)), at((k, i)))), (one,)),
    ]  # fmt: skip


def _places(family: Sequence[Shown], rng: Random) -> list[Statement]:
    plan = family[0].family
    one, other = (concepts()[i] for i in plan.focus)
    assert plan.relation is not None
    where = words.PLACES[plan.relation]
    claim, reverse = (f"{name_one(a)} {where} {name_one(b)}" for a, b in ((one, other), (other, one)))
    gone = other if family[2].of(other) is None else one
    side, (at, beyond) = _side(rng)
    with_both = rng.sample((0, 1, 3), 2)
    beside = rng.choice((1, 2, 3))
    without = rng.sample((1, 2, 3), 2)
    return [
        Statement(f"the {side} picture shows {claim}",
                  at((0, beside)), rng.choice((beyond((0, beside)), at((without[0], without[1])))), (one, other)),
        Statement(f"both pictures show {name_one(one)} and {name_one(other)}",
                  _either((with_both[0], with_both[1]), rng), _either((with_both[0], 2), rng), (one, other),
                  simple=True),
        Statement(f"one picture shows {claim} and the other {reverse}",
                  _either((0, 1), rng), _either(rng.choice(((0, 3), (1, 3))), rng), (one, other)),
        Statement(f"exactly one picture shows {claim}",
                  _either((0, beside), rng), _either((without[0], without[1]), rng), (one, other)),
        Statement(f"only the {side} picture shows {name_one(gone)}",
                  at((with_both[0], 2)), rng.choice((beyond((with_both[0], 2)), at((with_both[0], with_both[1])))),
                  (gone,), simple=True),
    ]  # fmt: skip


def _backgrounds(family: Sequence[Shown], rng: Random) -> list[Statement]:
    one = concepts()[family[0].family.one]
    place, color = words.on_background(family[0].color), family[0].color
    side, (at, beyond) = _side(rng)
    here, there = rng.sample((0, 3), 2)
    return [
        Statement(f"both pictures show {name_one(one)} on {place}",
                  (here, there), _either((here, 1), rng), (one,)),
        Statement(f"the {side} picture shows {name_one(one)} on {place}",
                  at((here, 1)), rng.choice((beyond((here, 1)), at((2, here)))), (one,)),
        Statement(f"the background is {color} in both pictures",
                  (here, there), _either((here, 1), rng), simple=True),
        Statement(f"only the {side} picture has {place}",
                  at((here, 1)), rng.choice((beyond((here, 1)), at((here, there)))), simple=True),
    ]  # fmt: skip


Order = Callable[[Pair], Pair]


def _side(rng: Random) -> tuple[str, tuple[Order, Order]]:
    """A side, with what puts the first of a pair there, and what puts it on the other side."""

    def keep(pair: Pair) -> Pair:
        return pair

    def swap(pair: Pair) -> Pair:
        return pair[::-1]

    return ("left", (keep, swap)) if rng.random() < 0.5 else ("right", (swap, keep))
