"""Whether sentences about pictures are true, judged from the masks of the drawings and not by the generator's code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from softmask.data.scenes.concepts import concepts
from softmask.data.scenes.draw import render
from softmask.data.scenes.layout import Scene

NUMBERS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7}
PLACES = {"above": (0, -1), "below": (0, 1), "to the left of": (-1, 0), "to the right of": (1, 0)}
COUNT = rf"({'|'.join(NUMBERS)})"
PLACE = rf"({'|'.join(PLACES)})"
COLOR = r"an? (\w+) background"


@dataclass(frozen=True)
class Picture:
    """Boxes (left, top, right, bottom) of the visible pixels in units of the side, by concept."""

    boxes: dict[str, list[tuple[float, float, float, float]]]
    background: str

    def count(self, name: str) -> int:
        return len(self.boxes.get(name, ()))

    @property
    def color(self) -> str:
        return self.background.split()[-1]


def look(scene: Scene, size: int = 64) -> Picture:
    apart = replace(scene, groups=tuple((k,) for k in range(len(scene.placements))))
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for placement, mask in zip(scene.placements, render(apart, size)[1], strict=True):
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        name = concepts()[placement.concept].name
        boxes.setdefault(name, []).append(tuple(float(edge) / size for edge in box))
    return Picture(boxes, scene.background.name)


@cache
def names() -> dict[str, str]:
    """What sentences call a concept, without articles and numbers -> its name."""
    found = {}
    for concept in concepts():
        lead = "pairs? of " if concept.form == "pair" else ""
        forms = [concept.name, concept.plural]
        if lead:
            forms += [f"pair of {concept.name}", f"pairs of {concept.name}"]
        found |= dict.fromkeys(forms, concept.name)
    return found


def name(phrase: str) -> str:
    return names()[re.sub(r"^(the|an?|some|any) ", "", phrase)]


def place(picture: Picture, one: str, where: str, other: str) -> bool | None:
    """Whether it is so; None if people might disagree, or one of the two is not shown once."""
    if picture.count(one) != 1 or picture.count(other) != 1:
        return None
    return place_of(picture.boxes[one][0], where, picture.boxes[other][0])


def place_of(a: Sequence[float], where: str, b: Sequence[float]) -> bool | None:
    shift = np.array([a[0] + a[2] - b[0] - b[2], a[1] + a[3] - b[1] - b[3]]) / 2
    along = float(shift @ PLACES[where])
    across = float(abs(shift @ np.array(PLACES[where])[::-1]))
    if along > 0.1 and along > 1.4 * across:
        return True
    return None if along > 0 and along > 0.75 * across else False


def shows(picture: Picture, phrase: str) -> bool | None:
    """ "an owl", "some cherries", "two owls", "an owl above a dog", "an owl on a green background"; None: disputed."""
    if match := re.fullmatch(rf"(.+) {PLACE} (.+)", phrase):
        one, where, other = match.groups()
        one, other = name(one), name(other)
        if not picture.count(one) or not picture.count(other):
            return False
        return place(picture, one, where, other)
    if match := re.fullmatch(rf"(.+) on {COLOR}", phrase):
        return picture.count(name(match[1])) == 1 and picture.color == match[2]
    if match := re.fullmatch(rf"{COUNT} (.+)", phrase):
        return picture.count(name(match[2])) == NUMBERS[match[1]]
    return picture.count(name(phrase)) == 1 if not phrase.startswith("any ") else picture.count(name(phrase)) > 0


def statement(text: str, left: Picture, right: Picture) -> bool | None:
    """Whether an NLVR2 statement is true."""
    both = (left, right)
    if match := re.fullmatch(rf"there are {COUNT} (.+) in the two pictures in all", text):
        return sum(one.count(name(match[2])) for one in both) == NUMBERS[match[1]]
    if match := re.fullmatch(r"both pictures show at least one (.+)", text):
        return all(one.count(name(match[1])) > 0 for one in both)
    if match := re.fullmatch(r"the background is (\w+) in both pictures", text):
        return left.color == right.color == match[1]
    if match := re.fullmatch(rf"only the (left|right) picture has {COLOR}", text):
        mine, other = both if match[1] == "left" else both[::-1]
        return mine.color == match[2] != other.color
    if match := re.fullmatch(r"(only )?the (left|right) picture shows (.+)", text):
        mine, other = both if match[2] == "left" else both[::-1]
        if more := re.fullmatch("more (.+) than the other", match[3]):
            return mine.count(name(more[1])) > other.count(name(more[1]))
        return _and(shows(mine, match[3]), _not(shows(other, match[3])) if match[1] else True)
    if match := re.fullmatch(r"both pictures show (.+)", text):
        parts = _parts(match[1])
        return _and(*(shows(one, part) for one in both for part in parts))
    if match := re.fullmatch(r"exactly one picture shows (.+)", text):
        found = [shows(one, match[1]) for one in both]
        return None if None in found else found[0] != found[1]
    match = re.fullmatch(r"one picture shows (.+) and the other (.+)", text)
    assert match, text
    first, second = match.groups()
    if second in NUMBERS:
        second = f"{second} {first.split(' ', 1)[1]}"
    return _or(_and(shows(left, first), shows(right, second)), _and(shows(right, first), shows(left, second)))


def _parts(text: str) -> list[str]:
    """Of "an owl and a dog"; names may hold "and" themselves."""
    words = text.split(" and ")
    for at in range(1, len(words)):
        parts = [" and ".join(words[:at]), " and ".join(words[at:])]
        if all(re.sub(r"^(an?|some) ", "", part) in names() for part in parts):
            return parts
    return [text]


def _and(*parts: bool | None) -> bool | None:
    return False if False in parts else None if None in parts else True


def _or(*parts: bool | None) -> bool | None:
    return True if True in parts else None if None in parts else False


def _not(part: bool | None) -> bool | None:
    return None if part is None else not part


def label(text: str, picture: Picture) -> str | None:
    """The label of an SNLI-VE hypothesis; None: disputed."""
    if match := re.fullmatch(rf"(.+) (?:is|are) {PLACE} (.+)", text):
        one, where, other = match.groups()
        one, other = name(one), name(other)
        subjects, so = (one, other), place(picture, one, where, other)
    elif match := re.fullmatch(rf"(.+) (?:is|are) (?:on|in front of) {COLOR}", text):
        subjects, so = (name(match[1]),), picture.color == match[2]
    else:
        match = re.fullmatch(rf"(?:there (?:is|are) |the picture shows )?{COUNT} (.+?)(?: can be seen)?", text)
        assert match, text
        subjects, so = (name(match[2]),), picture.count(name(match[2])) == NUMBERS[match[1]]
    if not all(map(picture.count, subjects)):
        return "neutral"
    return None if so is None else "entailment" if so else "contradiction"


def answer(text: str, picture: Picture) -> str | None:
    """The answer to a question; None: disputed."""
    if match := re.fullmatch(r"how many (.+?) (?:are there|are in the picture|can you see)\?", text):
        return str(picture.count(name(match[1])))
    if match := re.fullmatch(r"(?:is|are) there (.+?)(?: in the picture)?\?", text):
        return "yes" if picture.count(name(match[1])) else "no"
    if text == "what color is the background?":
        return picture.color
    if match := re.fullmatch(r"what background is behind (.+)\?", text):
        return picture.background if picture.count(name(match[1])) else None
    if match := re.fullmatch(rf"what is {PLACE} (.+)\?", text):
        where, known = match[1], name(match[2])
        (box,) = picture.boxes[known]
        found = {
            one: {place_of(other, where, box) for other in boxes}
            for one, boxes in picture.boxes.items()
            if one != known
        }
        sure = [one for one, so in found.items() if so == {True}]
        return sure[0] if len(sure) == 1 and all(so == {False} for one, so in found.items() if one != sure[0]) else None
    match = re.fullmatch(rf"(?:is|are) (the .+) {PLACE} (the .+)\?", text)
    assert match, text
    so = place(picture, name(match[1]), match[2], name(match[3]))
    return None if so is None else "yes" if so else "no"


def expression(text: str, picture: Picture) -> list[tuple[str, int]] | None:
    """The drawings (concept, number) of which a referring expression is true; None: disputed."""
    sides = {"at the top": "above", "at the bottom": "below", "on the left": "to the left of",
             "on the right": "to the right of"}  # fmt: skip
    match = re.fullmatch(rf"the (big |small )?(.+?)(?: ({'|'.join(sides)})| {PLACE} (the .+))?", text)
    assert match, text
    size, one, side, where, other = match.groups()
    one = names()[one]
    boxes = picture.boxes[one]
    found: list[bool | None] = []
    for k, box in enumerate(boxes):
        alike = boxes[:k] + boxes[k + 1 :]
        so: bool | None = True
        if side:
            so = _and(*(place_of(box, sides[side], b) for b in alike))
        if where:
            so = place_of(box, where, picture.boxes[name(other)][0]) if picture.count(name(other)) == 1 else None
        if size:
            ratios = [_side(box) / _side(b) for b in alike]
            so = all(r > 1.3 for r in ratios) if size == "big " else all(r < 1 / 1.3 for r in ratios)
        found.append(so)
    return None if None in found else [(one, k) for k, so in enumerate(found) if so]


def _side(box: Sequence[float]) -> float:
    return max(box[2] - box[0], box[3] - box[1])
