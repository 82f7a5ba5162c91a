"""The scenes of tasks and what is known of them; they depend on (seed, split, number) and the artists alone."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from softmask.data.scenes.background import Background, sample_background
from softmask.data.scenes.captions import Caption, Group
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.drawings import Placement, drawing_of
from softmask.data.scenes.layout import Hands, Scene, Split, drawn_by
from softmask.data.scenes.place import place
from softmask.data.scenes.tasks.families import MEMBERS, Family, Wanted, plan_family
from softmask.data.scenes.tasks.relations import is_clearly
from softmask.data.scenes.tasks.unseen import are_unseen, color_of

FIRST_ID: dict[Split, int] = {"train": 0, "val": 10**6, "test": 2 * 10**6}
"""Number of a split's first picture; pictures have different numbers in all splits, as COCO's have."""


IMAGES = "images"
"""The folder of all pictures: the readers of VQA, of RefCOCO and of Karpathy's splits look there, too."""

SUBTYPES: dict[Split, str] = {"train": "train2014", "val": "val2014", "test": "test2015"}
"""VQA's names of the splits, which are part of the pictures' names; readers expect a year."""


@dataclass(frozen=True)
class Shown:
    """What a picture shows; ``member`` is the scene's place in its family."""

    split: Split
    image_id: int
    family: Family
    member: int
    groups: tuple[Group, ...]
    background: Background

    @property
    def file(self) -> str:
        """COCO's name of the picture."""
        return f"COCO_{SUBTYPES[self.split]}_{self.image_id:012d}.jpg"

    @property
    def path(self) -> str:
        return f"{IMAGES}/{self.file}"

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return tuple(group.concept for group in self.groups)

    @property
    def color(self) -> str:
        return color_of(self.background)

    @property
    def unseen(self) -> bool:
        return are_unseen(self.concepts)

    def of(self, concept: Concept) -> Group | None:
        """The drawings of a concept."""
        return next((group for group in self.groups if group.concept == concept), None)


def sample(split: Split, number: int, *, seed: int, hands: Hands) -> tuple[Scene, Shown]:
    """Scene ``number`` of a split: how to draw it, without a caption, and what it shows."""
    family, member = plan_family(split, number // MEMBERS, seed=seed, hands=hands), number % MEMBERS
    scene, groups = arrange(family.wanted[member], Random(f"{seed}/tasks/{split}/scene/{number}"), hands)
    return scene, Shown(split, FIRST_ID[split] + number, family, member, groups, scene.background)


def arrange(wanted: Wanted, rng: Random, hands: Hands) -> tuple[Scene, tuple[Group, ...]]:
    """A random scene that shows what is wanted; its groups are in the order of ``wanted.counts``."""
    drawn = [i for i, (_, count) in enumerate(wanted.counts) for _ in range(count)]
    rng.shuffle(drawn)
    by_whom = [drawn_by(wanted.counts[i][0], hands, rng) for i in drawn]
    levels = [drawing_of(name, wanted.counts[i][0]).alphas for i, name in zip(drawn, by_whom, strict=True)]
    numbers = tuple(tuple(k for k, i in enumerate(drawn) if i == group) for group in range(len(wanted.counts)))
    while True:
        poses, boxes = place(levels, rng)
        groups = tuple(
            Group(concepts()[concept], tuple(boxes[k] for k in mine))
            for (concept, _), mine in zip(wanted.counts, numbers, strict=True)
        )
        if wanted.relation is None or is_clearly(groups[0], wanted.relation, groups[1]):
            break
    background = sample_background(rng)
    while wanted.color not in (None, color_of(background)):
        background = sample_background(rng)
    placements = tuple(
        Placement(wanted.counts[i][0], name, pose) for i, name, pose in zip(drawn, by_whom, poses, strict=True)
    )
    return Scene(placements, numbers, background, Caption("", ())), groups
