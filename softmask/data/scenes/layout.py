"""What scenes show: concepts, their drawings and places, sampled from (seed, split, index)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Literal, get_args

from softmask.data.scenes.background import Background, sample_background
from softmask.data.scenes.captions import Caption, Group, write_caption, write_caption_at
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.drawings import Placement, drawing_of, has_drawing
from softmask.data.scenes.place import place

Split = Literal["train", "val", "test", "seen"]
SPLITS: tuple[Split, ...] = get_args(Split)
Hands = tuple[tuple[str, ...], ...]
"""The sets of drawings of each artist."""

HELD_OUT_SHARE = 0.1
# Drawings per concept of a scene, each as often as it is likely.
_COUNTS: tuple[tuple[int, ...], ...] = (
    *((1,),) * 18, *((1, 1),) * 36, *((2,),) * 7, *((1, 1, 1),) * 20, *((2, 1),) * 7, *((3,),) * 2,
    *((1, 1, 1, 1),) * 5, *((2, 1, 1),) * 3, (2, 2), (3, 1),
)  # fmt: skip
_TEST_PAIR_SHARE = 0.65  # of test scenes with two or more concepts (82 %), so that half of all have one


@dataclass(frozen=True)
class Scene:
    """Content of an image of any size: ``placements`` from back to front, ``groups[i]`` as numbers of placements."""

    placements: tuple[Placement, ...]
    groups: tuple[tuple[int, ...], ...]
    background: Background
    caption: Caption


def held_out(one: Concept, other: Concept) -> bool:
    """Whether the pair occurs only in test; depends on the two names, in either order."""
    names = "|".join(sorted((one.name, other.name)))
    digest = hashlib.blake2b(names.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def sample_scene(
    split: Split, index: int, *, seed: int = 0, hands: Hands = (("openmoji",),), singles: int = 0, varied: int = 0
) -> Scene:
    """Scene ``index`` of a split, drawn by ``hands``. A scene of "seen" is the one of "test" by other hands.

    ``singles`` percent of training's scenes have one drawing, and captions that do not name the background; the others
    have as many drawings as those of the other splits. ``varied`` percent of training's drawings get another look.

    Raises:
        ValueError: an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"sample_scene: split must be one of {SPLITS}, got {split!r}")
    split = "test" if split == "seen" else split
    rng, draw = Random(f"{seed}/{split}/{index}"), Random(f"{seed}/{split}/{index}/hands")
    counts = rng.choice(_COUNTS)
    alone = split == "train" and Random(f"{seed}/{split}/{index}/singles").random() * 100 < singles
    if alone:
        counts = (1,)
    chosen = _choose_concepts(counts, split, rng, hands)
    drawn = rng.sample([i for i, count in enumerate(counts) for _ in range(count)], sum(counts))
    by_whom = [(chosen[i], drawn_by(chosen[i], hands, draw)) for i in drawn]
    poses, boxes = place([drawing_of(name, concept).alphas for concept, name in by_whom], rng)
    looks = _looks(len(poses), varied if split == "train" else 0, Random(f"{seed}/{split}/{index}/looks"))
    placements = tuple(Placement(*who, pose, look) for who, pose, look in zip(by_whom, poses, looks, strict=True))
    groups = tuple(tuple(k for k, i in enumerate(drawn) if i == group) for group in range(len(counts)))
    named = [Group(concepts()[chosen[i]], tuple(boxes[k] for k in group)) for i, group in enumerate(groups)]
    background = sample_background(rng)
    caption = write_caption_at(named, "", rng) if alone else write_caption(named, background.name, rng)
    return Scene(placements, groups, background, caption)


def _looks(count: int, percent: int, rng: Random) -> list[int | None]:
    """Numbers of other looks; None for a drawing as it is."""
    numbers = [(rng.random() * 100, rng.getrandbits(32)) for _ in range(count)]
    return [number if share < percent else None for share, number in numbers]


@lru_cache
def drawn_concepts(hands: Hands) -> list[int]:
    """Numbers of the concepts that at least one artist has drawn."""
    sets = [name for hand in hands for name in hand]
    return [number for number in range(len(concepts())) if any(has_drawing(name, number) for name in sets)]


def drawn_by(concept: int, hands: Hands, rng: Random) -> str:
    """A set of drawings that has the concept: of a random artist, and of this artist's sets a random one."""
    able = [[name for name in hand if has_drawing(name, concept)] for hand in hands]
    return rng.choice(rng.choice([names for names in able if names]))


def _choose_concepts(counts: Sequence[int], split: Split, rng: Random, hands: Hands) -> list[int]:
    """One concept per count; those with a count above 1 are countable."""
    wanted = split == "test" and len(counts) > 1 and rng.random() < _TEST_PAIR_SHARE
    known, drawn = concepts(), drawn_concepts(hands)
    while True:
        chosen = rng.sample(drawn, len(counts))
        if any(count > 1 and known[i].form == "some" for i, count in zip(chosen, counts, strict=True)):
            continue
        if any(held_out(known[a], known[b]) for a, b in combinations(chosen, 2)) == wanted:
            return chosen
