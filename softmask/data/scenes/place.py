"""Where the pictures of a scene go: random places at which enough of every picture stays visible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import numpy as np
from PIL import Image

from softmask.data.scenes.captions import Box
from softmask.data.scenes.drawings import OPAQUE, Pose, warp

MIN_VISIBLE = 0.6
_GRID = 64  # side of the coarse image on which pictures are placed, at every rendered size
_SIDES = {1: (0.45, 0.7), 2: (0.38, 0.6), 3: (0.33, 0.5), 4: (0.3, 0.42)}

Levels = Sequence[Image.Image]


def place(pictures: Sequence[Levels], rng: Random, *, tilt: float = 25) -> tuple[tuple[Pose, ...], list[Box]]:
    """Poses of pictures, given by the alpha levels of their pyramids from back to front, and their visible boxes.

    ``tilt`` is the largest angle by which a picture is turned, in degrees.
    """
    placed = None
    while placed is None:
        placed = _try(pictures, rng, tilt)
    return placed


def _try(pictures: Sequence[Levels], rng: Random, tilt: float) -> tuple[tuple[Pose, ...], list[Box]] | None:
    """One attempt; None if a picture has no room."""
    poses: list[Pose] = []
    areas: list[int] = []
    visible: list[np.ndarray] = []
    for levels in pictures:
        side, angle = rng.uniform(*_SIDES[len(pictures)]), math.radians(rng.uniform(-tilt, tilt))
        trial = Pose(0.5, 0.5, side, angle, rng.random() < 0.5)
        patch, origin = warp(levels, trial, _GRID)
        shape = np.asarray(patch) >= OPAQUE
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
        poses.append(replace(trial, x=0.5 + (x - origin[0]) / _GRID, y=0.5 + (y - origin[1]) / _GRID))
    return tuple(poses), [_box(mask) for mask in visible]


def _box(mask: np.ndarray) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return Box(*(float(edge) / len(mask) for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)))
