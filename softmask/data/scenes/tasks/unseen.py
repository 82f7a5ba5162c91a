"""What training never shows: concepts, pairs of concepts, and a class's backgrounds. Their names alone choose them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from itertools import combinations
from random import Random

from softmask.data.scenes.background import Background, sample_background
from softmask.data.scenes.concepts import Concept
from softmask.data.scenes.layout import held_out

UNSEEN_SHARE = 0.08
UNSEEN_COLORS = 2  # colours of backgrounds per class


@cache
def is_unseen(concept: Concept) -> bool:
    """Whether the concept occurs in the tests of tasks alone."""
    digest = hashlib.blake2b(concept.name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < UNSEEN_SHARE * 2**64


def are_unseen(concepts: Iterable[Concept]) -> bool:
    """Whether one of the concepts is unseen, or two of them are a pair that occurs in tests alone."""
    return _are_unseen(frozenset(concepts))


@cache
def _are_unseen(concepts: frozenset[Concept]) -> bool:
    return any(map(is_unseen, concepts)) or any(held_out(*pair) for pair in combinations(concepts, 2))


def color_of(background: Background) -> str:
    """The colour in a background's name: "blue" of "striped blue"."""
    return background.name.rpartition(" ")[2]


@cache
def unseen_colors(concept: Concept) -> frozenset[str]:
    """Colours of the backgrounds that the concept's class has in test alone."""
    rng = Random(f"{concept.name}/backgrounds")
    colors: set[str] = set()
    while len(colors) < UNSEEN_COLORS:
        colors.add(color_of(sample_background(rng)))
    return frozenset(colors)
