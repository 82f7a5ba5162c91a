"""Drawings as scenes use them: rasterized once, then turned, flipped and scaled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image

from softmask.data.scenes.artists import drawing_set, rasterize
from softmask.data.scenes.concepts import concepts

OPAQUE = 96  # least alpha at which a pixel belongs to a drawing


@dataclass(frozen=True)
class Pose:
    """Where a picture is in a scene: center and longer side in units of the image's side, angle in radians."""

    x: float
    y: float
    side: float
    angle: float
    flip: bool


@dataclass(frozen=True)
class Placement:
    """A drawing in a scene."""

    concept: int
    drawn_by: str  # name of the set of drawings
    pose: Pose
    look: int | None = None  # number of another look (looks.py); None: as drawn


@dataclass(frozen=True)
class Drawing:
    """Pyramid of a picture, each level half the last: ``colors`` (RGBa, for sampling) and ``alphas`` (L)."""

    colors: tuple[Image.Image, ...]
    alphas: tuple[Image.Image, ...]


def pyramid(image: Image.Image) -> Drawing:
    """The levels of an RGBA image."""
    image = image.convert("RGBa")
    colors = (image, image.reduce(2), image.reduce(4))
    return Drawing(colors, tuple(level.getchannel("a") for level in colors))


@cache
def has_drawing(drawn_by: str, concept: int) -> bool:
    return drawing_set(drawn_by).svg(concepts()[concept]) is not None


@cache
def drawing_of(drawn_by: str, concept: int) -> Drawing:
    """The drawing of a concept by a set that has it."""
    svg = drawing_set(drawn_by).svg(concepts()[concept])
    assert svg is not None
    return pyramid(rasterize(svg))


def warp(levels: Sequence[Image.Image], pose: Pose, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The rotated and scaled picture for an image of ``side`` pixels, and the position of its upper left corner."""
    width, height = levels[0].size
    scale = pose.side * side / max(width, height)
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    extents = scale * (cos * width + abs(sin) * height), scale * (abs(sin) * width + cos * height)
    centre = pose.x * side, pose.y * side
    origin = math.floor(centre[0] - extents[0] / 2), math.floor(centre[1] - extents[1] / 2)
    # The smallest level that is not enlarged, so that bilinear sampling skips no pixel.
    number = min(max(0, math.floor(-math.log2(scale))), len(levels) - 1)
    level = levels[number]
    step = 1 / (scale * 2**number)
    a, b, d, e = cos * step, sin * step, -sin * step, cos * step
    u, v = centre[0] - origin[0], centre[1] - origin[1]
    mirror = -1 if pose.flip else 1
    w, h = width / 2**number / 2, height / 2**number / 2
    matrix = (mirror * a, mirror * b, w - mirror * (a * u + b * v), d, e, h - (d * u + e * v))
    size = math.ceil(extents[0]) + 1, math.ceil(extents[1]) + 1
    return level.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR), origin
