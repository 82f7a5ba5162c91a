"""Backgrounds of generated scenes: two shades of one colour, mixed by a pattern."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
from PIL import Image

Pattern = Literal["plain", "gradient", "noise", "stripes", "dots", "checks"]

_COLORS = {
    "white": (246, 246, 242), "gray": (178, 180, 184), "red": (218, 98, 92), "pink": (246, 184, 204),
    "orange": (244, 172, 98), "yellow": (248, 228, 128), "green": (138, 198, 128), "blue": (122, 172, 232),
    "purple": (176, 146, 216), "brown": (172, 132, 98),
}  # fmt: skip
_PATTERNS: dict[Pattern, str] = {
    "plain": "", "gradient": "", "noise": "", "stripes": "striped ", "dots": "dotted ", "checks": "checkered ",
}  # fmt: skip


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


def sample_background(rng: Random) -> Background:
    pattern = rng.choice(tuple(_PATTERNS))
    name = rng.choice(tuple(_COLORS))
    base = tuple(value + rng.randint(-10, 9) for value in _COLORS[name])
    # The second colour is a shade of the first, so that one name fits both.
    target, contrast = rng.choice((0, 255)) if name != "white" else 0, rng.uniform(0.08, 0.3)
    shade = tuple(round(value + contrast * (target - value)) for value in base)
    angle, frequency, phase = rng.uniform(0, 2 * math.pi), rng.uniform(3, 8), rng.random()
    noise = rng.randbytes(rng.choice((4, 8, 16, 24)) ** 2) if pattern == "noise" else b""
    return Background(pattern, _PATTERNS[pattern] + name, (base, shade), angle, frequency, phase, noise)


def paint_background(background: Background, side: int) -> Image.Image:
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
