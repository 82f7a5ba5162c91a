"""Boxes, masks and referring expressions of test's and validation's pictures, as RefCOCO has them.

`grounding_instances.json` is in COCO's format of instances, with uncompressed run lengths: one for every drawing.
`grounding_refs.json` lists `{"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent"}]}`: up to three
expressions per drawing, each true of this drawing alone. Drawings without one are left out, as are pictures of a single
drawing. "The owl on the left" needs `data.flip: false`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np

from softmask.data import rle
from softmask.data.scenes.captions import Group
from softmask.data.scenes.concepts import Concept, concepts
from softmask.data.scenes.tasks import words
from softmask.data.scenes.tasks.relations import RELATIONS, Relation, is_clearly, is_possibly
from softmask.data.scenes.tasks.scenes import Shown

SENTENCES = 3  # most per drawing
_BIGGER = 1.5  # how many times the side of every other drawing of the concept
_SIDES: dict[Relation, str] = {"above": "at the top", "below": "at the bottom", "left": "on the left",
                               "right": "on the right"}  # fmt: skip


@dataclass(frozen=True)
class Masked:
    """A picture with the masks of its drawings, group after group: run lengths."""

    shown: Shown
    masks: tuple[dict[str, Any], ...]


def grounding_files(pictures: Iterable[Masked], seed: int) -> dict[str, Any]:
    """Name -> content of the two files."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    refs: list[dict[str, Any]] = []
    for picture in pictures:
        one = picture.shown
        if len(picture.masks) < 2:
            continue
        height, width = picture.masks[0]["size"]
        images.append({"id": one.image_id, "file_name": one.file, "width": width, "height": height})
        rng = Random(f"{seed}/tasks/grounding/{one.image_id}")
        for (group, drawing), mask in zip(_drawings(one), picture.masks, strict=True):
            annotations.append(_annotation(len(annotations) + 1, one.image_id, group, mask))
            found = list(dict.fromkeys(refer(one, group, drawing)))
            if found:
                refs.append({
                    "ref_id": len(refs) + 1,
                    "ann_id": len(annotations),
                    "image_id": one.image_id,
                    "split": one.split,
                    "sentences": [{"sent": text} for text in rng.sample(found, min(len(found), SENTENCES))],
                    **({"unseen": True} if one.unseen else {}),
                })  # fmt: skip
    categories = [{"id": number, "name": concept.name} for concept, number in _categories().items()]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    return {"grounding_instances.json": instances, "grounding_refs.json": refs}


@cache
def _categories() -> dict[Concept, int]:
    return {concept: number for number, concept in enumerate(concepts(), start=1)}


def _drawings(one: Shown) -> Iterator[tuple[Group, int]]:
    return ((group, drawing) for group in one.groups for drawing in range(len(group.boxes)))


def _annotation(number: int, image_id: int, group: Group, mask: dict[str, Any]) -> dict[str, Any]:
    inside = rle.decode(mask)
    rows, columns = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    return {
        "id": number,
        "image_id": image_id,
        "category_id": _categories()[group.concept],
        "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        "area": int(inside.sum()),
        "segmentation": mask,
        "iscrowd": 0,
    }


def refer(one: Shown, group: Group, drawing: int) -> Iterator[str]:
    """Expressions that are true of one drawing of a group alone."""
    mine = Group(group.concept, (group.boxes[drawing],))
    alike = [Group(group.concept, (box,)) for number, box in enumerate(group.boxes) if number != drawing]
    name = words.one_of(group.concept)
    if not alike:
        yield words.the(group.concept)
    else:
        yield from (f"the {name} {_SIDES[side]}" for side in RELATIONS if _is_outmost(mine, side, alike))
        if mine.boxes[0].side >= _BIGGER * max(box.side for same in alike for box in same.boxes):
            yield f"the big {name}"
        if mine.boxes[0].side * _BIGGER <= min(box.side for same in alike for box in same.boxes):
            yield f"the small {name}"
    for other in one.groups:
        if other is group or len(other.boxes) > 1:
            continue
        for relation in RELATIONS:
            alone = not any(is_possibly(same, relation, other) for same in alike)
            if alone and is_clearly(mine, relation, other):
                yield f"the {name} {words.PLACES[relation]} {words.the(other.concept)}"


def _is_outmost(mine: Group, side: Relation, alike: list[Group]) -> bool:
    return all(is_clearly(mine, side, same) for same in alike)
