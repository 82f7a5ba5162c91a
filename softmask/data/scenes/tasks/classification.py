"""Single drawings in folders by class, as ImageFolder reads them: `classification/{train,val,test,test_unseen}/CLASS/`.

All concepts are classes. Every class has two colours of backgrounds that only `test_unseen` shows; it has about a
quarter of the test's pictures. `classnames.txt` has a name per line in the order of the folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

from softmask.data.scenes.background import sample_background
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.draw import render
from softmask.data.scenes.layout import Hands, Split, drawn_concepts
from softmask.data.scenes.tasks.families import Wanted
from softmask.data.scenes.tasks.grounding import Masked
from softmask.data.scenes.tasks.scenes import arrange
from softmask.data.scenes.tasks.unseen import color_of, unseen_colors

CLASSES = "classification"
Folder = Literal["train", "val", "test", "test_unseen"]
SCENES_PER_PICTURE = 500  # scenes of the other tasks for each picture of a class
TEMPLATES = (
    "{c}", "a {c}", "an {c}", "some {c}", "a picture of a {c}", "a drawing of a {c}", "there is a {c}",
)  # fmt: skip


def classes(drawn_by: Sequence[Hands]) -> list[int]:
    """Numbers of the concepts that all of these have drawn, in the order of their folders."""
    common = set.intersection(*(set(drawn_concepts(hands)) for hands in drawn_by))
    return sorted(common, key=lambda number: folder_of(concepts()[number]))


def folder_of(concept: Concept) -> str:
    return concept.name.replace(" ", "_")


def class_texts(numbers: list[int]) -> dict[str, str]:
    """Path -> content of the files beside the folders."""
    return {
        f"{CLASSES}/classnames.txt": "".join(f"{concepts()[number].name}\n" for number in numbers),
        f"{CLASSES}/zeroshot_classification_templates.txt": "".join(f"{template}\n" for template in TEMPLATES),
    }


def pictures_per_class(split: Split, scenes: int) -> dict[Folder, int]:
    """Folder -> pictures of each class, for a split with so many scenes."""
    count = max(1, round(scenes / SCENES_PER_PICTURE)) if scenes else 0
    if split != "test":
        return {"train" if split == "train" else "val": count}
    unseen = max(1, round(count / 4)) if scenes else 0
    return {"test": max(unseen, count - unseen), "test_unseen": unseen}


def write_class(out: Path, number: int, count: int, size: int, seed: int, hands: Hands) -> list[Masked]:
    """The pictures of one class in ``out/CLASS``; ``out`` is a `Folder`. No other task is about them."""
    concept = concepts()[number]
    target = out / folder_of(concept)
    target.mkdir(parents=True)
    for index in range(count):
        rng = Random(f"{seed}/tasks/classification/{out.name}/{concept.name}/{index}")
        color = color_of(sample_background(rng))
        while (color in unseen_colors(concept)) != (out.name == "test_unseen"):
            color = color_of(sample_background(rng))
        scene, _ = arrange(Wanted(((number, 1),), color=color), rng, hands)
        render(scene, size)[0].save(target / f"{index:08d}.png", compress_level=1)
    return []
