"""Above, below, left and right, with margins between what is so, what is not, and what people would argue about."""

from __future__ import annotations

from typing import Literal, get_args

from softmask.data.scenes.captions import Box, Group

Relation = Literal["above", "below", "left", "right"]
RELATIONS: tuple[Relation, ...] = get_args(Relation)
OPPOSITE: dict[Relation, Relation] = {"above": "below", "below": "above", "left": "right", "right": "left"}

_LEAST = 0.15  # distance of the centers along the relation's axis, in units of the picture's side
_SLOPE = 1.75  # how many times longer than the distance across it
_OVERLAP = 0.3  # most of the smaller extent


def is_clearly(one: Group, relation: Relation, other: Group) -> bool:
    """Whether every drawing of ``one`` is beyond doubt above (below, left of, right of) every one of ``other``."""
    pairs = [(_turn(a, relation), _turn(b, relation)) for a in one.boxes for b in other.boxes]
    return all(_is_above(a, b) for a, b in pairs)


def is_possibly(one: Group, relation: Relation, other: Group) -> bool:
    """Whether somebody might say so of a drawing of each."""
    return any(_may_be_above(_turn(a, relation), _turn(b, relation)) for a in one.boxes for b in other.boxes)


def _turn(box: Box, relation: Relation) -> Box:
    """The box in a picture that is turned or mirrored such that ``relation`` becomes above."""
    if relation in ("left", "right"):
        box = Box(box.top, box.left, box.bottom, box.right)
    return Box(box.left, 1 - box.bottom, box.right, 1 - box.top) if relation in ("below", "right") else box


def _is_above(a: Box, b: Box) -> bool:
    along, across = _distances(a, b)
    overlap = a.bottom - b.top
    return along >= max(_LEAST, _SLOPE * across) and overlap <= _OVERLAP * min(a.bottom - a.top, b.bottom - b.top)


def _may_be_above(a: Box, b: Box) -> bool:
    along, across = _distances(a, b)
    return _SLOPE * along > across


def _distances(a: Box, b: Box) -> tuple[float, float]:
    """How far the center of ``a`` is above that of ``b``, and beside it."""
    (ax, ay), (bx, by) = a.center, b.center
    return by - ay, abs(ax - bx)
