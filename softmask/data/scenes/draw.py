"""Scenes of OpenMoji drawings: sampled from (seed, split, index), drawn at any size, with captions and masks."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from random import Random
from typing import Literal, get_args

import numpy as np
from PIL import Image

from softmask.data import rle
from softmask.data.scenes.captions import Box, Caption, Group, write_caption
from softmask.data.scenes.openmoji import Concept, concepts, rasterize

Split = Literal["train", "val", "test"]
Pattern = Literal["plain", "gradient", "noise", "stripes", "dots", "checks"]
SPLITS: tuple[Split, ...] = get_args(Split)
HELD_OUT_SHARE = 0.1
MIN_VISIBLE = 0.6
SUPERSAMPLING = 2
_GRID = 64  # side of the coarse image on which drawings are placed, at every rendered size
_OPAQUE = 96  # least alpha at which a pixel belongs to a drawing
_SIDES = {1: (0.45, 0.7), 2: (0.38, 0.6), 3: (0.33, 0.5), 4: (0.3, 0.42)}
# Drawings per concept of a scene, each as often as it is likely.
_COUNTS: tuple[tuple[int, ...], ...] = (
    *((1,),) * 18, *((1, 1),) * 36, *((2,),) * 7, *((1, 1, 1),) * 20, *((2, 1),) * 7, *((3,),) * 2,
    *((1, 1, 1, 1),) * 5, *((2, 1, 1),) * 3, (2, 2), (3, 1),
)  # fmt: skip
_TEST_PAIR_SHARE = 0.65  # of test scenes with two or more concepts (82 %), so that half of all have one

_COLORS = {
    "white": (246, 246, 242), "gray": (178, 180, 184), "red": (218, 98, 92), "pink": (246, 184, 204),
    "orange": (244, 172, 98), "yellow": (248, 228, 128), "green": (138, 198, 128), "blue": (122, 172, 232),
    "purple": (176, 146, 216), "brown": (172, 132, 98),
}  # fmt: skip
_PATTERNS: dict[Pattern, str] = {
    "plain": "", "gradient": "", "noise": "", "stripes": "striped ", "dots": "dotted ", "checks": "checkered ",
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """A drawing in a scene: center and longer side in units of the image's side, angle in radians."""

    concept: int
    x: float
    y: float
    side: float
    angle: float
    flip: bool


@dataclass(frozen=True)
class Background:
    """Two colours mixed by a pattern; ``noise`` is the bytes of a square gray image."""

    pattern: Pattern
    name: str
    colors: tuple[tuple[int, ...], tuple[int, ...]]
    angle: float
    frequency: float
    phase: float
    noise: bytes


@dataclass(frozen=True)
class Scene:
    """Content of an image of any size: ``placements`` from back to front, ``groups[i]`` as numbers of placements."""

    placements: tuple[Placement, ...]
    groups: tuple[tuple[int, ...], ...]
    background: Background
    caption: Caption


@dataclass(frozen=True)
class Drawing:
    """Pyramid of a rasterized concept, each level half the last: ``colors`` (RGBa, for sampling) and ``alphas`` (L)."""

    colors: tuple[Image.Image, ...]
    alphas: tuple[Image.Image, ...]


def held_out(one: Concept, other: Concept) -> bool:
    """Whether the pair occurs only in test; depends on the two names, in either order."""
    names = "|".join(sorted((one.name, other.name)))
    digest = hashlib.blake2b(names.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def sample_scene(split: Split, index: int, *, seed: int = 0) -> Scene:
    """Scene ``index`` of a split. Raises ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"sample_scene: split must be one of {SPLITS}, got {split!r}")
    rng = Random(f"{seed}/{split}/{index}")
    counts = rng.choice(_COUNTS)
    chosen = _choose_concepts(counts, split, rng)
    drawn = rng.sample([i for i, count in enumerate(counts) for _ in range(count)], sum(counts))
    layout = None
    while layout is None:
        layout = _place([chosen[i] for i in drawn], rng)
    placements, boxes = layout
    groups = tuple(tuple(k for k, i in enumerate(drawn) if i == group) for group in range(len(counts)))
    named = [Group(concepts()[chosen[i]], tuple(boxes[k] for k in group)) for i, group in enumerate(groups)]
    background = _sample_background(rng)
    return Scene(placements, groups, background, write_caption(named, background.name, rng))


def render(scene: Scene, size: int) -> tuple[Image.Image, list[np.ndarray]]:
    """Image (RGB, ``size`` square) and one mask ``[size, size]`` bool of visible pixels per group.

    Drawn at `SUPERSAMPLING` times the size, then averaged, so that a small image looks like a reduced large one.
    Drawings are rasterized for images of up to 256 pixels; larger images are blurred.
    """
    side = size * SUPERSAMPLING
    canvas = _paint_background(scene.background, side)
    labels = np.zeros((side, side), dtype=np.uint8)
    for number, placement in enumerate(scene.placements, start=1):
        patch, (x, y) = _warp(_drawings()[placement.concept].colors, placement, side)
        patch = patch.convert("RGBA")
        canvas.paste(patch, (x, y), patch)
        window = labels[y : y + patch.height, x : x + patch.width]
        opaque = np.asarray(patch.getchannel("A"))[: window.shape[0], : window.shape[1]] >= _OPAQUE
        window[opaque] = number
    taken = np.zeros((size, size), dtype=bool)
    visible: list[np.ndarray] = []
    for number in range(len(scene.placements), 0, -1):  # front to back: the front takes pixels that are half covered
        mask = (_count(labels == number) >= SUPERSAMPLING**2 // 2) & ~taken
        taken |= mask
        visible.insert(0, mask)
    masks = [np.logical_or.reduce([visible[k] for k in group]) for group in scene.groups]
    return canvas.reduce(SUPERSAMPLING), masks


def _count(inside: np.ndarray) -> np.ndarray:
    """Number of True values of ``[H, W]`` bool in each block of `SUPERSAMPLING` squared: uint8."""
    numbers, steps = inside.view(np.uint8), range(SUPERSAMPLING)  # strided sums: faster than sum() over short axes
    total = np.zeros_like(numbers[::SUPERSAMPLING, ::SUPERSAMPLING])
    for i in steps:
        for j in steps:
            total += numbers[i::SUPERSAMPLING, j::SUPERSAMPLING]
    return total


def encode_sample(scene: Scene, split: Split, size: int) -> dict[str, bytes]:
    """Members of a sample: "png", "txt" and "json" (write.py describes it)."""
    image, masks = render(scene, size)
    image.save(stream := io.BytesIO(), "PNG", compress_level=1)
    objects = [
        {
            "phrase": scene.caption.phrase(i),
            "span": list(scene.caption.spans[i]),
            "mask": rle.encode(masks[i]),
            "concept": concepts()[scene.placements[group[0]].concept].name,
            "count": len(group),
        }
        for i, group in enumerate(scene.groups)
    ]
    record = {"caption": scene.caption.text, "objects": objects, "split": split}
    return {"png": stream.getvalue(), "txt": scene.caption.text.encode(), "json": json.dumps(record).encode()}


@lru_cache(maxsize=1)
def _drawings() -> tuple[Drawing, ...]:
    drawings = []
    for concept in concepts():
        image = rasterize(concept).convert("RGBa")
        colors = (image, image.reduce(2), image.reduce(4))
        drawings.append(Drawing(colors, tuple(level.getchannel("a") for level in colors)))
    return tuple(drawings)


def _choose_concepts(counts: Sequence[int], split: Split, rng: Random) -> list[int]:
    """One concept per count; those with a count above 1 are countable."""
    wanted = split == "test" and len(counts) > 1 and rng.random() < _TEST_PAIR_SHARE
    known = concepts()
    while True:
        chosen = rng.sample(range(len(known)), len(counts))
        if any(count > 1 and known[i].form == "some" for i, count in zip(chosen, counts, strict=True)):
            continue
        if any(held_out(known[a], known[b]) for a, b in combinations(chosen, 2)) == wanted:
            return chosen


def _place(chosen: Sequence[int], rng: Random) -> tuple[tuple[Placement, ...], list[Box]] | None:
    """Placements from back to front and the visible boxes, or None if there is no room for a drawing."""
    placements: list[Placement] = []
    areas: list[int] = []
    visible: list[np.ndarray] = []
    for concept in chosen:
        side, angle = rng.uniform(*_SIDES[len(chosen)]), math.radians(rng.uniform(-25, 25))
        trial = Placement(concept, 0.5, 0.5, side, angle, rng.random() < 0.5)
        patch, origin = _warp(_drawings()[concept].alphas, trial, _GRID)
        shape = np.asarray(patch) >= _OPAQUE
        height, width = shape.shape
        for attempt in range(24):
            x, y = rng.randrange(_GRID - width + 1), rng.randrange(_GRID - height + 1)
            window = np.s_[y : y + height, x : x + width]
            left = [np.count_nonzero(seen) - np.count_nonzero(seen[window] & shape) for seen in visible]
            # Prefer little overlap: allow more of it with each failed attempt.
            least = 0.95 if attempt < 12 else 0.8 if attempt < 20 else MIN_VISIBLE + 0.05
            if all(rest >= least * area for rest, area in zip(left, areas, strict=True)):
                break
        else:
            return None
        for seen in visible:
            seen[window] &= ~shape
        visible.append(np.zeros((_GRID, _GRID), dtype=bool))
        visible[-1][window] = shape
        areas.append(int(np.count_nonzero(shape)))
        placements.append(replace(trial, x=0.5 + (x - origin[0]) / _GRID, y=0.5 + (y - origin[1]) / _GRID))
    return tuple(placements), [_box(mask) for mask in visible]


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(*(float(edge) / len(mask) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))


def _warp(levels: Sequence[Image.Image], placement: Placement, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The rotated and scaled drawing for an image of ``side`` pixels, and the position of its upper left corner."""
    width, height = levels[0].size
    scale = placement.side * side / max(width, height)
    cos, sin = math.cos(placement.angle), math.sin(placement.angle)
    extents = scale * (cos * width + abs(sin) * height), scale * (abs(sin) * width + cos * height)
    centre = placement.x * side, placement.y * side
    origin = math.floor(centre[0] - extents[0] / 2), math.floor(centre[1] - extents[1] / 2)
    # The smallest level that is not enlarged, so that bilinear sampling skips no pixel.
    number = min(max(0, math.floor(-math.log2(scale))), len(levels) - 1)
    level = levels[number]
    step = 1 / (scale * 2**number)
    a, b, d, e = cos * step, sin * step, -sin * step, cos * step
    u, v = centre[0] - origin[0], centre[1] - origin[1]
    mirror = -1 if placement.flip else 1
    w, h = width / 2**number / 2, height / 2**number / 2
    matrix = (mirror * a, mirror * b, w - mirror * (a * u + b * v), d, e, h - (d * u + e * v))
    size = math.ceil(extents[0]) + 1, math.ceil(extents[1]) + 1
    return level.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR), origin


def _sample_background(rng: Random) -> Background:
    pattern = rng.choice(tuple(_PATTERNS))
    name = rng.choice(tuple(_COLORS))
    base = tuple(value + rng.randint(-10, 9) for value in _COLORS[name])
    # The second colour is a shade of the first, so that one name fits both.
    target, contrast = rng.choice((0, 255)) if name != "white" else 0, rng.uniform(0.08, 0.3)
    shade = tuple(round(value + contrast * (target - value)) for value in base)
    angle, frequency, phase = rng.uniform(0, 2 * math.pi), rng.uniform(3, 8), rng.random()
    noise = rng.randbytes(rng.choice((4, 8, 16, 24)) ** 2) if pattern == "noise" else b""
    return Background(pattern, _PATTERNS[pattern] + name, (base, shade), angle, frequency, phase, noise)


def _paint_background(background: Background, side: int) -> Image.Image:
    base, shade = (Image.new("RGB", (side, side), color) for color in background.colors)
    return base if background.pattern == "plain" else Image.composite(shade, base, _pattern(background, side))


def _pattern(background: Background, side: int) -> Image.Image:
    """Share of the second colour at each pixel: gray image (L)."""
    if background.pattern == "noise":
        grain = math.isqrt(len(background.noise))
        return Image.frombytes("L", (grain, grain), background.noise).resize((side, side), Image.Resampling.BICUBIC)
    axis = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    cos, sin = math.cos(background.angle), math.sin(background.angle)
    u = axis[None, :] * cos + axis[:, None] * sin
    if background.pattern == "gradient":
        return Image.fromarray(((u / math.sqrt(2) + 0.5) * 255).astype(np.uint8))
    offset = background.phase + 16  # keeps coordinates positive, so that a cast is a floor
    u = u * background.frequency + offset
    if background.pattern == "stripes":
        return _two_tone((u * 2).astype(np.int32) & 1)
    v = (axis[:, None] * cos - axis[None, :] * sin) * background.frequency + offset
    if background.pattern == "checks":
        return _two_tone(((u * 2).astype(np.int32) ^ (v * 2).astype(np.int32)) & 1)
    u, v = u - u.astype(np.int32) - 0.5, v - v.astype(np.int32) - 0.5
    return _two_tone(u * u + v * v < 0.08)


def _two_tone(inside: np.ndarray) -> Image.Image:
    return Image.fromarray(inside.astype(np.uint8) * 255)
