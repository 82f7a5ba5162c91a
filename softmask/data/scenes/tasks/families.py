"""Families of four scenes that differ in what a task asks for, so that no task can be solved by its texts alone.

Scene 4 f + m is member m of family f. The kinds of families, for concepts a, b and c:

| kind | member 0 | 1 | 2 | 3 |
|---|---|---|---|---|
| count | k a | another number of a | a third number of a | b, no a |
| place | a above (below, left of, right of) b | b above a | c instead of a or of b | a and b side by side |
| background | a on a colour | a on another colour | b on one of the two, no a | as member 0 |

Members also show other concepts. Families of training and validation have none of what is unseen (unseen.py). More than
a quarter of test's families have: their a is unseen or makes an unseen pair with another concept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from typing import Literal

from softmask.data.scenes.background import sample_background
from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.layout import Hands, Split, drawn_concepts, held_out
from softmask.data.scenes.tasks.relations import OPPOSITE, RELATIONS, Relation
from softmask.data.scenes.tasks.unseen import color_of, is_unseen

MEMBERS = 4
MOST_DRAWINGS = 4  # in a scene

Kind = Literal["count", "place", "background"]
_KINDS: tuple[Kind, ...] = ("count", "count", "place", "place", "background")
_UNSEEN_FAMILIES = 0.29
_BESIDE = (1, 1, 2)  # further concepts of a member, each number as often as it is likely

Counts = tuple[tuple[int, int], ...]
"""Numbers of concepts, each with its number of drawings."""


@dataclass(frozen=True)
class Wanted:
    """What a scene has to show: concepts, the relation of the first one to the second, the background's colour."""

    counts: Counts
    relation: Relation | None = None
    color: str | None = None


@dataclass(frozen=True)
class Family:
    """The plan of four scenes; ``one``, ``other`` and ``third`` are the a, b and c of the module's table.

    ``relation`` is that of a to b in member 0 of a family of places. ``unseen``: whether it is about something unseen.
    """

    kind: Kind
    unseen: bool
    one: int
    other: int
    third: int
    wanted: tuple[Wanted, ...]
    relation: Relation | None = None

    @property
    def focus(self) -> tuple[int, ...]:
        """The concepts that questions about the family ask for."""
        return self.one, self.other


def plan_family(split: Split, number: int, *, seed: int, hands: Hands) -> Family:
    """Family ``number`` of a split, drawn by ``hands``."""
    rng = Random(f"{seed}/tasks/{split}/{number}")
    kind = rng.choice(_KINDS)
    unseen = split == "test" and rng.random() < _UNSEEN_FAMILIES
    by_pair = unseen and rng.random() < 0.5
    choose = _Chooser(hands, rng)
    one = choose(unseen=unseen and not by_pair, countable=kind == "count")
    partner = choose(partner_of=one) if by_pair else None
    other = partner if partner is not None and kind == "place" else choose()
    third = choose()
    if kind == "place" and rng.random() < 0.5:
        one, other = other, one
    relation = rng.choice(RELATIONS) if kind == "place" else None
    if relation is not None:
        members, partner = _places(one, other, third, relation, rng), None
    else:
        members = (_counts if kind == "count" else _backgrounds)(one, other, rng)
    bare = rng.randrange(MEMBERS)  # a single member without other concepts: two might have equal captions
    for place, wanted in enumerate(members):
        beside = [partner] if partner is not None and wanted.counts[0][0] == one else []
        beside += [choose() for _ in range(0 if place == bare else rng.choice(_BESIDE))]
        members[place] = _add(wanted, beside)
    return Family(kind, unseen, one, other, third, tuple(members), relation)


class _Chooser:
    """Draws concepts for a family: each once, and nothing unseen but where asked for."""

    def __init__(self, hands: Hands, rng: Random) -> None:
        self._pools, self._rng = _pools(hands), rng
        self._taken: list[int] = []

    def __call__(self, *, unseen: bool = False, countable: bool = False, partner_of: int | None = None) -> int:
        """Number of a concept; ``partner_of``: of one that makes an unseen pair with this one."""
        known = concepts()
        while True:
            number = self._rng.choice(self._pools[unseen])
            unfit = number in self._taken or (countable and known[number].form == "some")
            if not unfit and all(held_out(known[number], known[one]) == (one == partner_of) for one in self._taken):
                self._taken.append(number)
                return number


@lru_cache
def _pools(hands: Hands) -> tuple[list[int], list[int]]:
    """Numbers of the drawn concepts: those that training shows, and the unseen ones."""
    drawn, known = drawn_concepts(hands), concepts()
    return [i for i in drawn if not is_unseen(known[i])], [i for i in drawn if is_unseen(known[i])]


def _counts(one: int, other: int, rng: Random) -> list[Wanted]:
    numbers = rng.sample(range(1, MOST_DRAWINGS + 1), MEMBERS - 1)
    count = rng.randint(1, MOST_DRAWINGS) if concepts()[other].form != "some" else 1
    return [*(Wanted(((one, number),)) for number in numbers), Wanted(((other, count),))]


def _places(one: int, other: int, third: int, relation: Relation, rng: Random) -> list[Wanted]:
    def placed(first: int, how: Relation, second: int) -> Wanted:
        return Wanted(((first, 1), (second, 1)), how)

    across = rng.choice([how for how in RELATIONS if how not in (relation, OPPOSITE[relation])])
    changed = rng.choice(((third, other), (one, third)))
    return [
        placed(one, relation, other),
        placed(other, relation, one),
        placed(changed[0], relation, changed[1]),
        placed(one, across, other),
    ]


def _backgrounds(one: int, other: int, rng: Random) -> list[Wanted]:
    colors: list[str] = []
    while len(colors) < 2:
        color = color_of(sample_background(rng))
        colors += [color] if color not in colors else []
    shown = [(one, colors[0]), (one, colors[1]), (other, rng.choice(colors)), (one, colors[0])]
    return [Wanted(((concept, 1),), color=color) for concept, color in shown]


def _add(wanted: Wanted, beside: Sequence[int]) -> Wanted:
    """With a drawing of each further concept for which there is room."""
    room = MOST_DRAWINGS - sum(count for _, count in wanted.counts)
    return replace(wanted, counts=(*wanted.counts, *((concept, 1) for concept in beside[:room])))
