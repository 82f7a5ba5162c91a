"""Captions of generated scenes: a small grammar that names every object and says only what is true of the image.

There are no words for left and right, because training flips images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from random import Random

from softmask.data.scenes.concepts import Concept

MAX_WORDS = 20
_NUMBERS = ("", "a", "two", "three", "four")
OPENINGS = ("", "", "", "", "", "", "a picture of ", "a drawing of ", "there ", "there ")
_WORDS = {
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under"),
    "beside": ("next to", "next to", "beside"),
}
_SPATIAL_SHARE = 0.65
_BACKGROUND_SHARE = 0.35
_SIZE_SHARE = 0.3
_SIZE_RATIO = 1.5  # an object is big (small) if it is this many times larger (smaller) than every other one

Piece = str | int  # literal text, or the number of a group, for its phrase


@dataclass(frozen=True)
class Box:
    """Visible box in units of the image's side: x rightwards, y downwards, both in [0, 1]."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def center(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def side(self) -> float:
        return max(self.right - self.left, self.bottom - self.top)


@dataclass(frozen=True)
class Group:
    """All drawings of one concept in a scene, which share a noun phrase."""

    concept: Concept
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class Caption:
    """A text; ``spans[i]`` is the character span [start, end) of the phrase for group ``i``."""

    text: str
    spans: tuple[tuple[int, int], ...]

    def phrase(self, group: int) -> str:
        start, end = self.spans[group]
        return self.text[start:end]


def write_caption(groups: Sequence[Group], background: str, rng: Random) -> Caption:
    """The caption of drawings; ``background`` are the words before "background" ("green", "striped blue")."""
    return write_caption_at(groups, f"on {_article(background)} {background} background", rng)


def write_caption_at(groups: Sequence[Group], place: str, rng: Random, openings: Sequence[str] = OPENINGS) -> Caption:
    """Caption of at most `MAX_WORDS` words, unless the names of the objects alone are longer.

    Args:
        groups: 1 to 4 groups with distinct concepts; at most four drawings each.
        place: where everything is ("on a green background", "in a forest"), which some captions say; "" if unknown.
        rng: source of every choice.
        openings: what may come before the objects, each as often as it is listed; "there " becomes "there is".
    """
    nouns = _noun_phrases(groups, rng)
    first, body = _join(groups, nouns, rng)
    opening = rng.choice(openings)
    if opening == "there ":
        opening += "are " if _is_plural(groups[first]) else "is "
    pieces: list[Piece] = [opening, *body]
    if rng.random() < _BACKGROUND_SHARE and place:
        in_front = rng.random() < 0.2
        extended: list[Piece] = [f"{place}, ", *body] if in_front else [*pieces, f" {place}"]
        if _count_words(extended, groups) <= MAX_WORDS:
            return _assemble(extended, groups)
    return _assemble(pieces if _count_words(pieces, groups) <= MAX_WORDS else body, groups)


def name_one(concept: Concept) -> str:
    """The phrase for one drawing: "a dodo", "some broccoli", "a pair of jeans"."""
    if concept.form == "count":
        return f"{_article(concept.name)} {concept.name}"
    lead = "a pair of" if concept.form == "pair" else concept.form
    return f"{lead} {concept.name}".lstrip()


def is_above(upper: Group, lower: Group) -> bool:
    """Whether every drawing of ``upper`` is clearly above every one of ``lower``, more above than beside it."""
    return all(_box_above(a, b) for a in upper.boxes for b in lower.boxes)


def is_beside(one: Group, other: Group) -> bool:
    """Whether two single drawings are side by side: at the same height, with a narrow gap."""
    if len(one.boxes) > 1 or len(other.boxes) > 1:
        return False
    a, b = one.boxes[0], other.boxes[0]
    gap = max(a.left, b.left) - min(a.right, b.right)
    return abs(a.center[1] - b.center[1]) <= 0.15 and -0.1 <= gap <= 0.25


def _box_above(a: Box, b: Box) -> bool:
    (ax, ay), (bx, by) = a.center, b.center
    allowed = 0.3 * min(a.bottom - a.top, b.bottom - b.top)
    return by - ay >= max(0.15, abs(ax - bx)) and a.bottom - b.top <= allowed


def _noun_phrases(groups: Sequence[Group], rng: Random) -> list[list[Piece]]:
    sizes = [_size_word(groups, i) if rng.random() < _SIZE_SHARE else "" for i in range(len(groups))]
    return [_noun_phrase(groups[i], i, sizes[i]) for i in range(len(groups))]


def _noun_phrase(group: Group, number: int, size: str) -> list[Piece]:
    count, form = len(group.boxes), group.concept.form
    if form not in ("count", "pair"):
        return [f"{form} " if form else "", number]
    if form == "pair":
        noun = f"{size}pair{'s' * (count > 1)} of "
        return [f"{_NUMBERS[count]} {noun}", number]
    determiner = _NUMBERS[count] if count > 1 else _article(size or group.concept.name)
    return [f"{determiner} {size}", number]


def _size_word(groups: Sequence[Group], number: int) -> str:
    """The word "big " or "small " if that is obvious of a single drawing, else ""."""
    if len(groups[number].boxes) > 1 or groups[number].concept.form not in ("count", "pair"):
        return ""
    side = groups[number].boxes[0].side
    others = [box.side for i, group in enumerate(groups) if i != number for box in group.boxes]
    if side >= _SIZE_RATIO * max(others, default=0.3):
        return "big "
    if side * _SIZE_RATIO <= min(others, default=0.45):
        return "small "
    return ""


def _join(groups: Sequence[Group], nouns: Sequence[list[Piece]], rng: Random) -> tuple[int, list[Piece]]:
    """Number of the group that is named first, and the caption's body."""
    order = rng.sample(range(len(groups)), len(groups))
    if rng.random() < _SPATIAL_SHARE:
        facts = _facts(groups) or _partial_facts(groups)
        if facts:
            left, relation, right = rng.choice(facts)
            rest = [i for i in order if i not in left + right]
            related = [*_list(nouns, left), f" {rng.choice(_WORDS[relation])} ", *_list(nouns, right)]
            prefix: list[Piece] = [*_list(nouns, rest), ", and "] if rest else []
            return (rest or list(left))[0], prefix + related
    if len(groups) == 1 or rng.random() < 0.7:
        return order[0], _list(nouns, order)
    return order[0], [*nouns[order[0]], " with ", *_list(nouns, order[1:])]


def _list(nouns: Sequence[list[Piece]], order: Sequence[int]) -> list[Piece]:
    pieces: list[Piece] = []
    for position, number in enumerate(order):
        if position:
            pieces.append(" and " if position == len(order) - 1 else ", ")
        pieces.extend(nouns[number])
    return pieces


Fact = tuple[tuple[int, ...], str, tuple[int, ...]]


def _facts(groups: Sequence[Group]) -> list[Fact]:
    """True statements "these above (below, next to) those" that name every group."""
    everything = range(len(groups))
    facts: list[Fact] = []
    for count in range(1, len(groups)):
        for upper in combinations(everything, count):
            lower = tuple(i for i in everything if i not in upper)
            if all(is_above(groups[a], groups[b]) for a in upper for b in lower):
                facts += [(upper, "above", lower), (lower, "below", upper)]
    if len(groups) == 2 and is_beside(*groups):
        facts += [((0,), "beside", (1,)), ((1,), "beside", (0,))]
    return facts


def _partial_facts(groups: Sequence[Group]) -> list[Fact]:
    """True statements about two of three or more groups."""
    facts: list[Fact] = []
    for a, b in permutations(range(len(groups)), 2):
        if is_above(groups[a], groups[b]):
            facts += [((a,), "above", (b,)), ((b,), "below", (a,))]
        if is_beside(groups[a], groups[b]):
            facts.append(((a,), "beside", (b,)))
    return facts


def _assemble(pieces: Sequence[Piece], groups: Sequence[Group]) -> Caption:
    text, spans = "", [(0, 0)] * len(groups)
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        else:
            start = len(text)
            text += _name(groups[piece])
            spans[piece] = (start, len(text))
    return Caption(text, tuple(spans))


def _count_words(pieces: Sequence[Piece], groups: Sequence[Group]) -> int:
    return len(_assemble(pieces, groups).text.split())


def _name(group: Group) -> str:
    return group.concept.plural if len(group.boxes) > 1 else group.concept.name


def _is_plural(group: Group) -> bool:
    if group.concept.form == "some":
        return group.concept.name.endswith("s")
    return len(group.boxes) > 1


def _article(following: str) -> str:
    if following.startswith(("unicorn", "ufo")):  # written with a vowel, spoken with a consonant
        return "a"
    return "an" if following.startswith(("a", "e", "i", "o", "u", "hourglass")) else "a"
